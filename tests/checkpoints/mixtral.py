"""Mixtral, and what belongs to no family: the place of the stacked axis, sizes, RoPE."""

from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

MIXTRAL: Settings = {"decoder_block": "mixtral"}

ROW = Row(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    model=MIXTRAL,
    told=MIXTRAL,
    cases={
        "tied": (TIED,),
        "tied-unnormalised": (TIED, {"normalize_embedding_logits": False}),
        "unscanned": (UNSCANNED,),
        "axis0": (TIED, {"param_scan_axis": 0}),
        "axis2": ({"param_scan_axis": 2},),
        "mqa-head-dim-24-top-1-theta-1e4-eps-1e-6": (
            {"base_num_kv_heads": 1, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 1},
            {"rope_max_timescale": 10_000, "normalization_layer_epsilon": 1e-6},
        ),
        "mha-top-4-theta-1e6-eps-1e-3": (
            {"base_num_kv_heads": 4, "num_experts": 8, "num_experts_per_tok": 4},
            {"rope_max_timescale": 1_000_000, "normalization_layer_epsilon": 1e-3},
        ),
        "llama3.1-rope": (LLAMA31,),
        "llama3.1-rope-unscaled": (LLAMA31, {"rope_use_scale": False}),
    },
)
