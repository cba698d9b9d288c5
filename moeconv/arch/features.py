"""Config fields that make MaxText compute something the targets cannot hold, each with its verdict.

Shapes do not show them, so they must be told; none is ever dropped silently. The neutral value is
the one under which the mixtral, envy and llama2 blocks compute what Hugging Face's Mixtral and
Llama do, established on MaxText 0.2.5 by running each block with and without the key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moeconv.arch.yaml_file import short

_IGNORED = "is ignored by this decoder block in MaxText, and so by the converted model"


class Verdict(StrEnum):
    """What a value other than the neutral one means."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclass(frozen=True)
class Feature:
    """One config field that only a neutral value of can be converted.

    Attributes:
        key: MaxText config key.
        neutral: Values that mean "a plain Mixtral or Llama".
        says: What another value does, continuing "KEY=VALUE …".
        verdict: Whether another value is refused or only warned about.
        blocks: Decoder blocks that honour the key; None for all.
        visible: Another value shows in the parameter tree, so that nobody needs to tell this one.
    """

    key: str
    neutral: tuple[Any, ...]
    says: str
    verdict: Verdict = Verdict.REFUSE
    blocks: tuple[str, ...] | None = None
    visible: bool = False

    def is_neutral(self, value: Any) -> bool:
        """Whether a value leaves the model a plain one."""
        plain = tuple(value) if isinstance(value, list) else value
        return any(plain == n for n in self.neutral)


_OFF = (False, None, 0, 0.0, "", -1, -1.0)
_MOE = ("mixtral", "envy")

FEATURES: tuple[Feature, ...] = (
    Feature("use_qk_norm", _OFF, "normalises queries and keys", blocks=("envy",)),
    Feature(
        "use_post_ffw_norm", _OFF, "adds a norm behind the MLP", blocks=("envy",), visible=True
    ),
    Feature("final_logits_soft_cap", _OFF, "caps the tied logits with tanh"),
    Feature(
        "attn_logits_soft_cap", _OFF, "caps the attention scores with tanh", blocks=("llama2",)
    ),
    Feature("mlp_activations", (("silu", "linear"),), "replaces SwiGLU by another activation"),
    Feature("mlp_bias", _OFF, "adds biases to the experts", blocks=_MOE, visible=True),
    Feature("attention_sink", _OFF, "adds attention sinks", visible=True),
    Feature("routed_score_func", _OFF, "scores experts otherwise than by softmax", blocks=_MOE),
    Feature("routed_bias", _OFF, "adds a bias to the router", blocks=_MOE, visible=True),
    Feature("use_random_routing", _OFF, "routes at random", blocks=_MOE),
    Feature("te_moe_block", _OFF, "routes by TransformerEngine's own rules", blocks=_MOE),
    Feature("weight_sparsity_n", _OFF, "masks weights while computing"),
    Feature("rope_linear_scaling_factor", (1, 1.0), "stretches RoPE's timescales"),
    Feature("rope_min_timescale", (1, 1.0), "changes RoPE's shortest timescale"),
    Feature("use_untrainable_positional_embedding", _OFF, "adds sinusoidal positions"),
    Feature("trainable_position_size", _OFF, "adds learned positions", visible=True),
    Feature("mhc_expansion_rate", (1, 0), "widens the residual stream (hyper-connections)"),
    Feature("engram_layers", ((), None), "adds engram layers"),
    Feature("moba", _OFF, "attends to blocks of keys chosen by a router"),
    Feature(
        "attention_type",
        ("global", "local_sliding", "chunk", "full", "compressed"),
        "attends otherwise than causally to everything before",
    ),
    Feature(
        "quantization",
        _OFF,
        "computes matmuls in low precision while training; the converted model computes them in "
        "full precision",
        Verdict.WARN,
    ),
    Feature(
        "capacity_factor",
        _OFF,
        "drops tokens over an expert's capacity (with sparse_matmul=false), also in MaxText's "
        "evaluation; Hugging Face models never drop one",
        Verdict.WARN,
        _MOE,
    ),
    Feature(
        "ragged_buffer_factor",
        _OFF,
        "drops tokens over an expert's buffer; Hugging Face models never drop one",
        Verdict.WARN,
        _MOE,
    ),
    # Ignored by all three blocks (same logits with and without), so the converted model is right
    # without them; but who set one believes to have it.
    *(
        Feature(key, neutral, _IGNORED, Verdict.WARN, blocks)
        for key, neutral, blocks in (
            ("attention_bias", _OFF, None),
            ("attn_logits_soft_cap", _OFF, _MOE),
            ("attention_type", ("global", "block_diffusion"), None),
            ("sliding_window_size", _OFF, None),
            ("shared_experts", _OFF, None),
            ("routed_scaling_factor", (1, 1.0), None),
            ("n_routing_groups", _OFF, None),
            ("mlp_activations_limit", _OFF, None),
            ("nope_layer_interval", _OFF, None),
            ("temperature_tuning", _OFF, None),
            ("share_kv_projections", _OFF, None),
            ("use_post_attn_norm", _OFF, None),
            ("first_num_dense_layers", _OFF, None),
        )
    ),
)


def verdicts(
    block: str, told: Mapping[str, Any], *, tied: bool
) -> tuple[list[str], list[str], list[str]]:
    """Judges what was told about the features.

    Args:
        block: `decoder_block`.
        told: Config values by MaxText key.
        tied: Whether the output head is the embedding.

    Returns:
        Refusals, warnings (both sentences), and keys that nobody told though nothing shows them.
    """
    refusals: list[str] = []
    warnings: list[str] = []
    untold: list[str] = []
    for feature in FEATURES:
        if feature.blocks is not None and block not in feature.blocks:
            continue
        if feature.key not in told:
            if feature.verdict is Verdict.REFUSE and not feature.visible:
                untold.append(feature.key)
        elif not feature.is_neutral(told[feature.key]):
            if feature.key == "final_logits_soft_cap" and not tied:
                continue  # `apply_output_head` caps only tied logits
            sentence = f"{feature.key}={short(told[feature.key])} {feature.says}"
            (refusals if feature.verdict is Verdict.REFUSE else warnings).append(sentence)
    return refusals, warnings, sorted(set(untold))
