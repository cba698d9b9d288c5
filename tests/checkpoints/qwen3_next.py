"""Qwen3-Next: a gated delta net, gated attention, a shared expert with a gate, two stacked axes."""

from dataclasses import replace

from checkpoints.mistakes import ZERO, key, rule
from checkpoints.row import TIED, UNSCANNED, Mistaken, Row, Settings

# All sizes differ; two value heads a head of keys; of six layers two fill no block.
QWEN3_NEXT: Settings = {
    "decoder_block": "qwen3_next",
    "base_num_decoder_layers": 6,
    "base_moe_mlp_dim": 32,
    "base_mlp_dim": 32,
    "shared_experts": 1,
    "norm_topk_prob": True,
    "inhomogeneous_layer_cycle_interval": 4,
    "gdn_conv_kernel_dim": 3,
    "gdn_num_key_heads": 2,
    "gdn_key_head_dim": 10,
    "gdn_num_value_heads": 4,
    "gdn_value_head_dim": 6,
    "gdn_chunk_size": 16,
    "partial_rotary_factor": 0.5,
    # The delta net's output may be as small as the root of this, and its norm makes that 1.
    "normalization_layer_epsilon": 1e-3,
}
TOLD: Settings = {
    "decoder_block": "qwen3_next",
    "shared_experts": 1,
    "gdn_num_key_heads": 2,
    "gdn_key_head_dim": 5,
    "gdn_num_value_heads": 4,
    "gdn_value_head_dim": 3,
    "partial_rotary_factor": 0.5,
}


def factor(part: float) -> Mistaken:
    """A page that rotates another part of a head."""
    top = key("partial_rotary_factor", lambda x: part)
    within = key("rope_parameters", lambda found: {**found, "partial_rotary_factor": part})
    return lambda target: top(within(target))


ROW = Row(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    model=QWEN3_NEXT,
    told={**TOLD, "inhomogeneous_layer_cycle_interval": 3},
    last=("linear moe+shared", "gated moe+shared"),
    cases={
        "unscanned-tied-unnormalised": (
            UNSCANNED,
            TIED,
            {"normalize_embedding_logits": False, "inhomogeneous_layer_cycle_interval": 3},
        ),
        # One local layer a block, and none left; a head of values for each of keys, whole heads
        # rotated.
        "axis0-tied-without-shared-expert-blocks-of-2": (
            TIED,
            {"param_scan_axis": 0, "shared_experts": 0, "inhomogeneous_layer_cycle_interval": 2},
            {"gdn_num_key_heads": 3, "gdn_num_value_heads": 3, "partial_rotary_factor": 1.0},
        ),
    },
    mistaken_model={**UNSCANNED, "base_num_decoder_layers": 2,
                    "inhomogeneous_layer_cycle_interval": 2},
    mistakes={
        "no scale of the first norm": (
            rule("input_layernorm.weight", scale=ZERO), "layer 0 attention"),
        "no decay": (rule("linear_attn.A_log", scale=ZERO), "layer 0 attention"),
        "no bias of time steps": (rule("linear_attn.dt_bias", scale=ZERO), "layer 0 attention"),
        "no scale within the delta net": (
            rule("linear_attn.norm.weight", scale=ZERO), "layer 0 attention"),
        "no norm of keys": (rule("k_norm.weight", scale=ZERO), "layer 1 attention"),
        "no gate of the shared expert": (
            rule("shared_expert_gate.weight", scale=ZERO), "layer 0 experts"),
        "no shared expert": (
            rule("shared_expert.down_proj.weight", scale=ZERO), "layer 0 experts"),
        "gates of heads before queries": (
            rule("q_proj.weight", place="D H Q -> (Q H) D"), "layer 1 attention"),
        "heads of keys one for another": (
            lambda target: key("linear_num_key_heads", lambda n: 1)(
                key("linear_key_head_dim", lambda n: 20)(target)), "layer 0 attention"),
        "whole heads rotated": (factor(1.0), "layer 1 attention"),
        "a quarter of heads rotated": (factor(0.25), "layer 1 attention"),
    },
    lost=(
        "model.layers.0.linear_attn.A_log",
        "model.layers.0.linear_attn.conv1d.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
    ),
    told_wrong=("partial_rotary_factor=1",),
)  # fmt: skip

# Of six layers MaxText drops the last two.
QWEN3_5 = replace(
    ROW,
    name="qwen3_5",
    model={
        **QWEN3_NEXT, "decoder_block": "qwen3_5", "use_mrope": True, "mrope_section": [2, 1, 1]
    },
    told={**TOLD, "decoder_block": "qwen3_5", "inhomogeneous_layer_cycle_interval": 2},
    cases={
        "unscanned-tied-without-shared-expert": (
            UNSCANNED,
            TIED,
            {"shared_experts": 0, "use_mrope": False, "partial_rotary_factor": 0.75},
        ),
    },
    mistakes={},
    lost=(),
    told_wrong=(),
)  # fmt: skip
