"""Mistral, which is dense."""

from checkpoints.row import LLAMA31, TIED, UNSCANNED, Row, Settings

MISTRAL: Settings = {"decoder_block": "mistral", "num_experts": 1}

ROW = Row(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    model=MISTRAL,
    told=MISTRAL,
    cases={"unscanned-tied-llama3.1-rope": (UNSCANNED, TIED, LLAMA31)},
)
