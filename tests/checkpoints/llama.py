"""Llama 2 and 3, which are dense."""

from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

LLAMA2: Settings = {"decoder_block": "llama2", "num_experts": 1}

ROW = Row(
    name="llama2",
    architecture="LlamaForCausalLM",
    model_type="llama",
    model=LLAMA2,
    told=LLAMA2,
    cases={
        "unscanned-axis0": (UNSCANNED, {"param_scan_axis": 0}),
        "llama3.1-rope-tied": (LLAMA31, TIED, {"head_dim": 32}),
    },
)
