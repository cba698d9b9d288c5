"""Dense Qwen 3: norms of queries and keys."""

from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

QWEN3: Settings = {"decoder_block": "qwen3", "num_experts": 1, "use_qk_norm": True}

ROW = Row(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    model=QWEN3,
    told=QWEN3,
    cases={
        "unscanned-tied-llama3.1-rope": (UNSCANNED, TIED, LLAMA31),
        # Without what makes it a Qwen it is a Llama whose query is scaled explicitly.
        "plain-axis0": ({"use_qk_norm": False, "param_scan_axis": 0},),
    },
    other_types={"plain-axis0": "llama"},
)
