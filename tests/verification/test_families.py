"""Every family by every level of verify, against MaxText itself."""

import json

import pytest
from cli_runner import moeconv
from helpers import config_file
from maxtext_lab import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT_OSS,
    KIMI_K2,
    LLAMA4,
    MISTRAL,
    OLMO3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    TIED,
)

from moeconv.families import blocks

pytestmark = [pytest.mark.slow, pytest.mark.proof("families"), pytest.mark.maxtext]
# A family is one row; the blocks of the reference model are in test_parity.py.
FAMILIES = {
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "GptOssForCausalLM": GPT_OSS,
    "Llama4ForCausalLM": LLAMA4,
    "Olmo3ForCausalLM": OLMO3,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
}
FORMS = {
    "scanned, untied": {},
    "unscanned, tied": {"scan_layers": False, **TIED},
    "scanned, tied, interleaved RoPE": {"rope_type": "llama3.1", "max_target_length": 96, **TIED},
}


CASES = [
    (architecture, form)
    for architecture, family in FAMILIES.items()
    for form, changes in FORMS.items()
    if changes.get("rope_type", "default") in (*blocks()[family["decoder_block"]].ropes, "default")
]


@pytest.mark.parametrize(("architecture", "form"), CASES)
def test_all_levels_pass(maxtext_lab, tmp_path, architecture, form):
    checkpoint = maxtext_lab.checkpoint(FAMILIES[architecture], FORMS[form])
    passes_all_levels(checkpoint, tmp_path, architecture)


@pytest.mark.parametrize(
    ("family", "full_state"),
    [(KIMI_K2, False), (DEEPSEEK_V3, True), ({**DEEPSEEK_V3, "scan_layers": False}, True)],
    ids=["Kimi-K2", "a train state", "an unscanned train state"],
)
def test_the_router_bias_beside_the_parameters(maxtext_lab, tmp_path, family, full_state):
    """In a collection of its own, and in a train state's nnx_aux."""
    checkpoint = maxtext_lab.checkpoint(family, full_state=full_state)
    passes_all_levels(checkpoint, tmp_path, "DeepseekV3ForCausalLM")


def passes_all_levels(checkpoint, tmp_path, architecture):
    config, out = config_file(tmp_path / "config", checkpoint.config), tmp_path / "out"
    converted = moeconv("convert", checkpoint.step_dir, out, "--config", config)
    assert converted.code == 0, converted.err
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    ran = moeconv("verify", out, "--config", config, "--tokens", 256, "--json")
    found = json.loads(ran.out)
    statuses = {(c["level"], c["name"]): c["status"] for c in found["checks"]}
    bad = {name: status for name, status in statuses.items() if status == "fail"}
    assert ran.code == 0 and not bad, (bad, ran.err)
    assert {level for level, _ in statuses} == {"structure", "weights", "logits", "layers"}
    for level in ("logits", "layers"):
        assert statuses[level, "parity"] == "pass"
        assert statuses[level, "reference"] == "pass"
    assert statuses["layers", "hidden"] == "pass"
