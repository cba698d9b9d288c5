"""The reference model: dense layers among those with experts, written as a Mixtral."""

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
