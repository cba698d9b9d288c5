"""The reference model: dense layers among those with experts; with QK norm too."""

from checkpoints.mistakes import ZERO, key, rule
from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

ENVY: Settings = {
    "decoder_block": "envy",
    "interleave_moe_layer_step": 2,
    "inhomogeneous_layer_cycle_interval": 2,
    "use_qk_norm": False,
    "use_post_ffw_norm": False,
    "base_mlp_dim": 80,
}
STEP3: Settings = {
    "base_num_decoder_layers": 6,
    "interleave_moe_layer_step": 3,
    "inhomogeneous_layer_cycle_interval": 3,
}

ROW = Row(
    name="envy",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    model=ENVY,
    told={
        "decoder_block": "envy",
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 2,
    },
    cases={
        "tied": (TIED,),
        "unscanned": (TIED, UNSCANNED),
        "axis0": (TIED, {"param_scan_axis": 0}),
        "step-3": (TIED, STEP3),
        "step-3-unscanned": (TIED, STEP3, UNSCANNED),
        "one-width-top-1": ({"base_mlp_dim": 96, "num_experts_per_tok": 1},),
        "wide-dense-mha-head-dim-32-top-4": (
            TIED,
            {"base_mlp_dim": 128, "base_num_kv_heads": 4, "head_dim": 32},
            {"num_experts": 8, "num_experts_per_tok": 4},
        ),
        "all-moe": (
            {
                "base_mlp_dim": 96,
                "interleave_moe_layer_step": 1,
                "inhomogeneous_layer_cycle_interval": 1,
            },
        ),
        "cycle-of-two-steps": (
            TIED,
            {"interleave_moe_layer_step": 2, "inhomogeneous_layer_cycle_interval": 4},
        ),
        "llama3.1-rope": (LLAMA31,),
    },
)

QK_NORM = Row(
    name="envy_qk_norm",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    model={**ENVY, "use_qk_norm": True, "base_moe_mlp_dim": 64},
    cases={
        "unscanned-tied-llama3.1-rope": (UNSCANNED, TIED, LLAMA31),
        "step-3-axis0": (STEP3, {"param_scan_axis": 0}),
    },
    mistaken_model={"base_num_decoder_layers": 2},
    mistakes={
        "no norm of queries": (rule("q_norm.weight", scale=ZERO), "layer 0 attention"),
        "no norm of keys": (rule("k_norm.weight", scale=ZERO), "layer 0 attention"),
        "weights of experts not normalised": (
            key("norm_topk_prob", lambda yes: False), "layer 1 experts"),
        "with fewer experts": (key("num_experts_per_tok", lambda n: 1), "layer 1 experts"),
    },
    lost=("model.layers.1.self_attn.k_norm.weight", "model.layers.0.mlp.up_proj.weight"),
    told_wrong=("num_experts_per_tok=1",),
)  # fmt: skip
