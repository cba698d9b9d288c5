"""DeepSeek-V3.2: DeepSeek-V3, whose attention sees only the keys that an indexer ranks highest.

MaxText (layers/attention_mla.py `Indexer`) and transformers (models/deepseek_v32
`DeepseekV32Indexer`) rank by the same scores: rotated halves at the front of each index head,
where attention has neighbours at the end, a LayerNorm of keys with epsilon 1e-6, ReLU, and a
weighted sum over heads. Of keys with equal scores at the border MaxText takes the first, torch's
`topk` any. Where there are no more keys than `indexer_topk`, both attend to all.
"""

from dataclasses import replace
from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import Layers
from moeconv.families._deepseek import (
    INDEXED,
    NARROW,
    RULES,
    biased,
    caveats,
    config,
    groups,
    refusal,
)
from moeconv.families._shared import setting, tied
from moeconv.families.deepseek_v3 import BIAS, late_name, routing_refusal, scores
from moeconv.mapping.rules import Options, Probe, Rule, Target, from_field

# fmt: off
_PLACE = "model.layers.{L}.self_attn.indexer"
_INDEXER = (
    Rule("self_attention.indexer.wq_b.kernel",  f"{_PLACE}.wq_b.weight",
         "q I i -> (I i) q", layers=INDEXED),
    Rule("self_attention.indexer.wk.kernel",    f"{_PLACE}.wk.weight", "D i -> i D",
         layers=INDEXED),
    Rule("self_attention.indexer.k_norm.scale", f"{_PLACE}.k_norm.weight", "i -> i",
         layers=INDEXED),
    Rule("self_attention.indexer.k_norm.bias",  f"{_PLACE}.k_norm.bias", "i -> i",
         layers=INDEXED),
    Rule("self_attention.indexer.weights_proj.kernel", f"{_PLACE}.weights_proj.weight",
         "D I -> I D", layers=INDEXED),
)
# fmt: on


def _requires(model: ModelDescription) -> str | None:
    if (reason := refusal(model, indexed=True) or routing_refusal(model)) is not None:
        return reason
    if (size := model.index_head_dim or 0) < (part := model.qk_rope_head_dim or 0):
        return f"its index heads have {size} entries, fewer than the {part} that are rotated"
    return None


def _alone(config: Any, number: int, is_moe: bool) -> None:
    config.mlp_layer_types = ["sparse" if is_moe else "dense"]


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = [*caveats(model, options), *late_name(model)]
    if groups(model)[1] < groups(model)[0] and biased(vars(model)):
        lines.append(
            "mlx-lm gives experts of the groups that are not chosen the score 0 instead of none, "
            "so that one is chosen where the bias makes better scores negative"
        )
    if tied(model, options):
        lines.append("mlx-lm loads no DeepSeek-V3.2 without an output head; --untie writes it")
    return lines


TARGET = Target(
    name="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    summary="For models of MaxText's deepseek block with an indexer: DeepSeek-V3.2.",
    kinds=Layers(attention="mla_index"),
    requires=_requires,
    since="5.11.0",
    caveats=_caveats,
    rules=(
        *(replace(rule, layers=INDEXED) if rule.layers == NARROW else rule for rule in RULES),
        *_INDEXER,
        *BIAS,
    ),
    probe=Probe(scores=scores, alone=_alone),
    config=(
        *config(
            "deepseek_v32",
            "DeepseekV32ForCausalLM",
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            num_nextn_predict_layers=0,
        ),
        # Which transformers 5.11 and 5.12 read instead of `n_routed_experts`.
        from_field("num_local_experts", "num_experts"),
        from_field("index_n_heads"),
        from_field("index_head_dim"),
        setting("index_topk", "index_topk"),
    ),
)
