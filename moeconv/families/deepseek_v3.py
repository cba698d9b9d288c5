"""MaxText's deepseek block, and DeepSeek-V3 with Kimi-K2: a sigmoid router with a bias and groups.

MaxText's configs of both (deepseek3-671b, kimi-k2-1t) have no groups unless `n_routing_groups` is
given; the published DeepSeek-V3 chooses in 4 of 8. What was trained is what is written.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import Layers
from moeconv.families._deepseek import (
    LAYERS,
    NAMES,
    ROUTED,
    RULES,
    SETTINGS,
    alone,
    biased,
    caveats,
    config,
    groups,
    refusal,
    routes_as_v3,
    routes_so_since,
    stacking,
)
from moeconv.families._deepseek_reading import reading
from moeconv.families._shared import (
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    QUANTISES,
    fused_experts,
    shared_experts,
)
from moeconv.mapping.reading import multimodal
from moeconv.mapping.rules import Options, Probe, Rule, Target


def _eligible(scores: NDArray[Any], model: ModelDescription) -> NDArray[Any]:
    """The best groups by the sum of their two best scores; layers/moe.py `expert_group_mask`."""
    number, best = groups(model)
    mask = np.ones((*scores.shape[:-1], number), bool)
    if best < number:
        grouped = scores.reshape(*scores.shape[:-1], number, -1)
        ranks = np.argsort(-np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1), -1, kind="stable")
        np.put_along_axis(mask, ranks[..., best:], False, axis=-1)
    return np.repeat(mask, scores.shape[-1] // number, axis=-1)


BLOCK = Block(
    name="deepseek",
    since="0.1.0",
    note="latent attention; dense layers first, then experts beside shared ones",
    layers=LAYERS,
    targets=("deepseek_v3", "deepseek_v2", "deepseek_v32"),
    stackings=(
        stacking("unscanned", "layers_{}", stacked=False),
        stacking("prefixed", "layers", stacked=True),
    ),
    query_scale_in_kernel=False,
    ropes=("yarn",),
    settings=SETTINGS,
    shapes={
        "first_num_dense_layers": lambda m: sum(kind.mlp == "dense" for kind in m["layer_kinds"]),
        "shared_experts": shared_experts,
        "q_lora_rank": lambda m: m["q_lora_rank"] or 0,
        "kv_lora_rank": lambda m: m["kv_lora_rank"],
        "qk_nope_head_dim": lambda m: m["qk_nope_head_dim"],
        "qk_rope_head_dim": lambda m: m["qk_rope_head_dim"],
        "v_head_dim": lambda m: m["v_head_dim"],
        "indexer_n_heads": lambda m: m["index_n_heads"],
        "indexer_head_dim": lambda m: m["index_head_dim"],
    },
    shown={"use_indexer": "mla_index"},
    # Before 0.2.4 the block normalised behind the scaling where it was asked to (`get_topk`).
    demands={"attention_type": ("mla",), "norm_topk_prob": (False,)},
    # It changes the indexer's loss alone (layers/attention_mla.py `calculate_indexer_loss`).
    honours={"indexer_sparse_training": (True,)},
    config=lambda model, cycle: {"attention_type": "mla"},
    taps=Taps(
        mlp={"dense": "mlp", "moe": "DeepSeekMoeBlock_0"},
        router="MoeBlock_0.gate",
        eligible=_eligible,
    ),
    idle=IDLE | IDLE_MOE - {"norm_topk_prob"},
    warns={**DROPS_TOKENS, **QUANTISES},
    refuses={
        "engram_layers": "adds engram layers (layers/engram.py), and no stock architecture has any",
        "mhc_expansion_rate": "widens the residual stream (hyper-connections, layers/mhc.py), and "
        "moeconv has no page for a stock architecture that does",
    },
)

# fmt: off
_CORRECTION = "model.layers.{L}.mlp.gate.e_score_correction_bias"
BIAS = (
    Rule(f"{ROUTED}.gate.bias", _CORRECTION, "E -> E", layers=Layers(mlp="moe", variant="bias")),
    Rule(None,                  _CORRECTION, "E -> E", layers=Layers(mlp="moe", variant="")),
)
# fmt: on


def routing_refusal(model: ModelDescription) -> str | None:
    """Why a router of DeepSeek-V3's kind does not hold a model."""
    if (score := model.settings["routed_score_func"]) != "sigmoid":
        return f"routed_score_func={score!r}; it scores experts by sigmoid"
    if biased(vars(model)) and not routes_as_v3(model):
        return (
            "MaxText weighs the chosen experts with the router's bias, unless model_name begins "
            f"with {', '.join(NAMES)} (layers/moe.py `get_topk`); it weighs them without"
        )
    (number, best), count = groups(model), model.num_experts or 0
    if count % number or not 0 < best <= number or count // number < (2 if number > 1 else 1):
        return f"n_routing_groups={number} and topk_routing_group={best} of {count} experts"
    if (model.num_experts_per_tok or 0) > best * count // number:
        return f"{best} of {number} groups have fewer experts than a token goes to"
    return None


def late_name(model: ModelDescription) -> list[str]:
    """What is said of a model whose name decides its routing only since MaxText 0.2.5."""
    if not (biased(vars(model)) and routes_so_since(model)):
        return []
    return [
        "MaxText before 0.2.5 weighed the experts of models named kimi-k2 with the router's "
        "bias, which no stock architecture does; if it trained this one, the output computes "
        "something else"
    ]


def scores(mlp: Any, output: Any) -> Any:
    """The values by which a DeepSeek-V3 ranks experts, as MaxText's gate gives them."""
    return output[0].sigmoid() + mlp.gate.e_score_correction_bias


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = caveats(model, options)
    if groups(model)[1] < groups(model)[0] and biased(vars(model)):
        lines.append(
            "transformers before 5.7 and mlx-lm give experts of the groups that are not chosen the "
            "score 0 instead of none, so that one is chosen where the bias makes better scores "
            "negative"
        )
    return [*lines, *late_name(model)]


OWN: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
}

TARGET = Target(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    summary="For models of MaxText's deepseek block with a sigmoid router: DeepSeek-V3, Kimi-K2.",
    kinds=Layers(),
    requires=lambda model: refusal(model) or routing_refusal(model),
    since="4.51.0",
    caveats=_caveats,
    spelled=fused_experts(ROUTED),
    rules=(*RULES, *BIAS),
    probe=Probe(scores=scores, alone=alone),
    config=config("deepseek_v3", "DeepseekV3ForCausalLM", **OWN),
    reading=replace(
        reading(biased=True, **OWN),
        # The first in the release's own code, the second in transformers.
        multimodal=tuple(
            multimodal(
                name,
                ("vision_tower", "vision tower"),
                ("mm_projector", "projector of images"),
            )
            for name in ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration")
        ),
    ),
)
