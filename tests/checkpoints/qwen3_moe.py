"""Qwen 3 with experts."""

from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

QWEN3_MOE: Settings = {
    "decoder_block": "qwen3_moe",
    "use_qk_norm": True,
    "norm_topk_prob": True,
}

ROW = Row(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    model=QWEN3_MOE,
    told={"decoder_block": "qwen3_moe", "use_qk_norm": True},
    cases={"unscanned-tied-llama3.1-rope": (UNSCANNED, TIED, LLAMA31)},
)
