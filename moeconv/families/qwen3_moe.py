"""Qwen3-MoE: Qwen3's attention, and experts in every layer, or in all but some (`envy`).

MaxText's weights of the chosen experts sum to 1 whatever `norm_topk_prob` says, as its softmax is
over their logits alone (layers/moe.py `get_topk`); so the target always says true.
"""

from dataclasses import replace
from typing import Any

from moeconv import families
from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import LayerKind, Layers
from moeconv.families._consumers import dense_of_qwen3_moe
from moeconv.families._shared import (
    ATTENTION,
    ATTENTION_PARAMETERS,
    CONFIG,
    DERIVED,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    MLP,
    NO_WINDOW,
    QUANTISES,
    TRUNK,
    experts,
    fused_experts,
    moe_parameters,
    rope_reading,
    untied_by_sglang,
    yarn_reading,
)
from moeconv.families.qwen3 import QK_NORM, QK_NORM_RULES
from moeconv.mapping.reading import Config, Reading
from moeconv.mapping.rules import (
    ConfigKey,
    Probe,
    Rule,
    Target,
    When,
    constant,
    from_field,
)

BLOCK = Block(
    name="qwen3_moe",
    since="0.1.0",
    note="every layer is a Mixture of Experts, with a norm of queries and keys",
    layers={
        LayerKind("qk_norm moe"): (
            *ATTENTION_PARAMETERS,
            *QK_NORM,
            *moe_parameters("moe_block"),
        ),
    },
    targets=("qwen3_moe",),
    query_scale_in_kernel=False,
    shown={"use_qk_norm": "qk_norm"},
    honours={"norm_topk_prob": (True,)},  # as it always does
    idle=IDLE | IDLE_MOE | {"mrope_section"},
    warns={**DROPS_TOKENS, **QUANTISES},
    taps=Taps(mlp={"moe": "moe_block"}),
)


def _experts_in(module: str) -> tuple[Rule, ...]:
    """The rules of router and experts, for the blocks that have them in a module of that name."""
    here = When(
        f"experts are in {module}",
        lambda m, o: families.blocks()[m.decoder_block].taps.mlp.get("moe") == module,
    )
    rules = experts(module, "mlp", gate="gate_proj", up="up_proj", down="down_proj")
    return tuple(replace(rule, when=here) for rule in rules)


def _alone(config: Any, number: int, is_moe: bool) -> None:
    config.mlp_only_layers = [] if is_moe else [0]


def _requires(model: ModelDescription) -> str | None:
    return None if model.moe_layers else "it has no Mixture-of-Experts layer"


def _dense(config: Config) -> list[int]:
    """`mlp_only_layers`, or all but each n-th layer (`Qwen3MoeDecoderLayer.__init__`)."""
    step = config["decoder_sparse_step"]
    return [n for n in range(config["num_hidden_layers"]) if (n + 1) % step]


def _reading_fields(config: Config) -> dict[str, Any]:
    dense = set(config["mlp_only_layers"])
    kinds = ["qk_norm dense" if n in dense else "qk_norm moe"
             for n in range(config["num_hidden_layers"])]  # fmt: skip
    return {
        **rope_reading(config),
        "layer_kinds": kinds,
        "intermediate_size": config["intermediate_size"] if dense else None,
    }


TARGET = Target(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    summary="For models with experts and a norm of queries and keys; transformers ≥ 4.51.",
    kinds=Layers(attention="qk_norm"),
    since="4.51.0",
    requires=_requires,
    caveats=lambda model, options: [
        *untied_by_sglang(model, options),
        *dense_of_qwen3_moe(model),
    ],
    reading=Reading(
        {**DERIVED, "mlp_only_layers": _dense},
        _reading_fields,
        yarn_reading,
        ignored=frozenset({"decoder_sparse_step", "intermediate_size"}),
    ),
    spelled=fused_experts("moe_block"),
    rules=(
        *TRUNK,
        *ATTENTION,
        *QK_NORM_RULES,
        *MLP,
        *_experts_in("moe_block"),
        *_experts_in("MoeBlock_0"),
    ),
    probe=Probe(alone=_alone),
    config=(
        constant("architectures", ["Qwen3MoeForCausalLM"]),
        constant("model_type", "qwen3_moe"),
        *CONFIG,
        ConfigKey(
            "intermediate_size",
            lambda m, o: m.intermediate_size or m.moe_intermediate_size,
            "`intermediate_size`; without dense layers `moe_intermediate_size`",
        ),
        from_field("moe_intermediate_size"),
        from_field("num_experts"),
        from_field("num_experts_per_tok"),
        constant("norm_topk_prob", True),
        constant("decoder_sparse_step", 1),
        ConfigKey("mlp_only_layers", lambda m, o: list(m.dense_layers), "dense layers"),
        constant("attention_bias", False),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
        *NO_WINDOW,
    ),
)
