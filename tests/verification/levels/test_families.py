"""Every family by every level of verify, against MaxText itself."""

import json

import pytest
from checkpoints import ROWS
from checkpoints.deepseek import DEEPSEEK_V3, KIMI_K2
from checkpoints.row import FORMS, UNSCANNED
from cli_runner import moeconv
from helpers import config_file

from moeconv.families import blocks

pytestmark = [pytest.mark.slow, pytest.mark.maxtext]
DEEPSEEK = pytest.mark.proof("DeepSeek by all levels")
HYBRIDS = ("gemma", "gemma2", "gemma3", "gemma4", "gemma4_small", "qwen3_next", "qwen3_5")
DENSE = ("llama2", "mistral", "qwen2", "qwen3", "olmo3", "gpt3")
PROOFS = {
    "deepseek": DEEPSEEK,
    **dict.fromkeys(HYBRIDS, pytest.mark.proof("Gemma and Qwen3-Next by all levels")),
    **dict.fromkeys(DENSE, pytest.mark.proof("dense families by all levels")),
}
EXPERTS = pytest.mark.proof("families of experts by all levels")


def can_have(row, form):
    """Returns True if MaxText has the family's model in that form."""
    rope = FORMS[form].get("rope_type", "default")
    return form in row.forms and rope in (*blocks()[row.block].ropes, "default")


CASES = [
    pytest.param(name, form, marks=PROOFS.get(row.block, EXPERTS))
    for name, row in ROWS.items()
    for form in FORMS
    if can_have(row, form)
]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_all_levels_pass(maxtext_lab, tmp_path, family, form):
    row = ROWS[family]
    checkpoint = maxtext_lab.checkpoint(row.model, FORMS[form])
    passes_all_levels(checkpoint, tmp_path, row.architecture)


@DEEPSEEK
@pytest.mark.parametrize(
    ("settings", "full_state"),
    [(KIMI_K2, False), (DEEPSEEK_V3, True), ({**DEEPSEEK_V3, **UNSCANNED}, True)],
    ids=["Kimi-K2", "a train state", "an unscanned train state"],
)
def test_the_router_bias_beside_the_parameters(maxtext_lab, tmp_path, settings, full_state):
    """In a collection of its own, and in a train state's nnx_aux."""
    checkpoint = maxtext_lab.checkpoint(settings, full_state=full_state)
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
