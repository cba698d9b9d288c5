"""Adapters that MaxText trains and saves, in PEFT and merged: its own logits, with LoRA applied.

The adapter is made by MaxText and qwix (`lora_lab`): `apply_lora_to_model`, `save_checkpoint`.
"""

import numpy as np
import pytest
from checkpoints.deepseek import DEEPSEEK_V3
from checkpoints.gemma import GEMMA3
from checkpoints.gpt_oss import GPT_OSS
from checkpoints.llama import LLAMA2
from checkpoints.mixtral import MIXTRAL
from checkpoints.qwen3 import QWEN3
from checkpoints.qwen3_next import QWEN3_NEXT
from checkpoints.row import TIED, UNSCANNED
from helpers import PARITY, assert_same_logits, config_file, run
from lora_lab import ALPHA, write

import moeconv
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.verification.checks import Status

pytestmark = [pytest.mark.slow, pytest.mark.proof("lora"), pytest.mark.maxtext]

CASES = {
    "llama2": LLAMA2,
    "qwen3 unscanned and tied": {**QWEN3, **TIED, **UNSCANNED},
    "mixtral": MIXTRAL,
    "deepseek": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "gemma3": GEMMA3,
    "qwen3_next unscanned": {**QWEN3_NEXT, **UNSCANNED},
}
EVERYTHING = "decoder/.*"


def planned(lora, out, **options):
    config = config_file(out.parent / f"{out.name}-config", lora.base.config)
    source = str(options.pop("source", lora.base.step_dir))
    prepared = plan_conversion(source, ConvertOptions(config=config, **options))
    convert(prepared, out)
    return config


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_maxtext_does(maxtext_lab, tmp_path, name):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = maxtext_lab.checkpoint(CASES[name], full_state=name == "deepseek")
    lora = write(tmp_path / "lora", base)
    run(base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    tokens = torch.tensor(lora.tokens).long()
    with torch.no_grad():
        plain = model(tokens).logits.numpy()
        planned(lora, tmp_path / "out", source=lora.step_dir, base=str(base.step_dir))
        model = PeftModel.from_pretrained(model, tmp_path / "out").eval()
        single = model(tokens).logits.numpy()
        exact = model.to(torch.float64)(tokens).logits.numpy()
    rounding = np.abs(single - exact).max()
    assert rounding < 1e-4
    assert np.abs(lora.logits - plain).max() > 1
    assert np.abs(lora.logits - exact).max() <= PARITY * rounding
    if name != "deepseek":  # parameters alone lack the bias of its router
        options = {"base": str(lora.both_dir), "sets": [f"lora_alpha={ALPHA}"]}
        planned(lora, tmp_path / "both", source=lora.both_dir, **options)
        one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "both"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_proves_a_merged_model(maxtext_lab, tmp_path, dtype):
    """Norms, router and experts too: all that qwix puts factors beside."""
    base = maxtext_lab.checkpoint(MIXTRAL)
    lora = write(tmp_path / "lora", base, modules=EVERYTHING)
    assert any("MoeBlock_0.wo_lora_a" in name for name in lora.factors)
    config = planned(lora, tmp_path / "out", merge_lora=str(lora.step_dir), dtype=dtype)
    if dtype == "float32":
        assert_same_logits(tmp_path / "out", lora.tokens, lora.logits)
    report = moeconv.verify(tmp_path / "out", config=config, tokens=64)
    statuses = {(check.level, check.name): check.status for check in report.report.checks}
    assert not [name for name, status in statuses.items() if status is Status.FAIL], (
        report.as_dict()
    )
    for name in (("weights", "values"), ("logits", "parity"), ("layers", "parity")):
        assert statuses[name] is Status.PASS, report.as_dict()
