"""Qwen 2: biases of queries, keys and values."""

from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

QWEN2: Settings = {"decoder_block": "qwen2", "num_experts": 1, "attention_bias": True}

ROW = Row(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    model=QWEN2,
    told=QWEN2,
    cases={
        "unscanned-tied-llama3.1-rope": (UNSCANNED, TIED, LLAMA31),
        # Without what makes it a Qwen it is a Llama whose query is scaled explicitly.
        "plain": ({"attention_bias": False},),
    },
    other_types={"plain": "llama"},
)
