"""Every family by every level of verify, against MaxText itself."""

import json

import pytest
from cli_runner import moeconv
from helpers import config_file
from maxtext_lab import GPT_OSS, LLAMA4, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, TIED

pytestmark = [pytest.mark.slow, pytest.mark.proof("families"), pytest.mark.maxtext]
# A family is one row; the blocks of the reference model are in test_parity.py.
FAMILIES = {
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "GptOssForCausalLM": GPT_OSS,
    "Llama4ForCausalLM": LLAMA4,
}
FORMS = {
    "scanned, untied": {},
    "unscanned, tied": {"scan_layers": False, **TIED},
    "scanned, tied, interleaved RoPE": {"rope_type": "llama3.1", "max_target_length": 96, **TIED},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_all_levels_pass(maxtext_lab, tmp_path, architecture, form):
    checkpoint = maxtext_lab.checkpoint(FAMILIES[architecture], FORMS[form])
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
