"""DeepSeek-V2: as V3, but a softmax over all experts, whose weights need not sum to 1.

The published DeepSeek-V2 (not V2-Lite) chooses in the best 3 of 8 groups of experts; MaxText
chooses among all (layers/moe.py `get_topk`). What was trained is what is written: greedy.
"""

from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import Layers
from moeconv.families._deepseek import (
    ROUTED,
    RULES,
    alone,
    biased,
    caveats,
    config,
    groups,
    is_scaled,
    refusal,
)
from moeconv.families._deepseek_reading import reading
from moeconv.families._shared import fused_experts
from moeconv.mapping.rules import Options, Probe, Target


def _requires(model: ModelDescription) -> str | None:
    if (reason := refusal(model)) is not None:
        return reason
    if (score := model.settings["routed_score_func"]) != "softmax":
        return f"routed_score_func={score!r}; it scores experts by softmax"
    if biased(vars(model)):
        return "its router has a bias"
    if groups(model) != (1, 1):
        return "MaxText ranks groups of experts by their two best scores, DeepSeek-V2 by the best"
    if model.hidden_size % model.num_attention_heads:  # configuration_deepseek_v2.py
        return f"its width {model.hidden_size} is no multiple of {model.num_attention_heads} heads"
    return None


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = caveats(model, options)
    if is_scaled(model):
        lines.append(
            "transformers before 5.15 leaves out YaRN's scale of attention in DeepSeek-V2, and "
            "computes something else without a word (modeling_deepseek_v2.py)"
        )
    return lines


OWN: dict[str, Any] = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "mlp_bias": False,
}

TARGET = Target(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    summary="For models of MaxText's deepseek block with a softmax router: DeepSeek-V2, V2-Lite.",
    kinds=Layers(),
    requires=_requires,
    since="5.15.0",
    caveats=_caveats,
    spelled=fused_experts(ROUTED),
    rules=RULES,
    probe=Probe(scores=lambda mlp, output: output[0].softmax(dim=-1), alone=alone),
    config=config("deepseek_v2", "DeepseekV2ForCausalLM", **OWN),
    reading=reading(biased=False, **OWN),
)
