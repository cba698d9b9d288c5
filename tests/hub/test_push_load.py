"""From a run to strangers: converted, verified against MaxText, pushed, and loaded from the Hub."""

import json
import re
import subprocess
import sys

import cli_runner
import hub_server
import outputs
import pytest
from huggingface_hub.utils import close_session

from moeconv.hub.gate import judge
from moeconv.hub.local import Output
from moeconv.verification.checks import Status
from moeconv.verification.report.files import write_report
from moeconv.verification.run import verify
from moeconv.verification.settings import ParityOptions, VerifyOptions

pytestmark = pytest.mark.maxtext

# What the Hub gives against what lies here, in one process and by one code.
LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
tokens = torch.randint(0, 260, (2, 64))
logits = []
for place in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    with torch.no_grad():
        logits.append(model(tokens).logits)
assert logits[0].std() > 0.05
print("equal" if torch.equal(*logits) else "different")
"""


def snippet(card: str, library: str) -> str:
    """The code of a card that a reader would copy."""
    (code,) = (c for c in re.findall(r"```python\n([\s\S]*?)```", card) if f"from {library}" in c)
    return code


def stranger(hub: hub_server.Hub, home, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Somebody else's Python, without a token, with an empty cache."""
    env = cli_runner.environment(
        HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(home), CUDA_VISIBLE_DEVICES=""
    )
    env.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """An output, verified against MaxText itself; not to be changed."""
    folder = tmp_path_factory.mktemp("proven")
    out = outputs.convert_run(outputs.write_run(folder / "run"), folder / "out")
    options = VerifyOptions(levels=("structure", "weights", "logits"), parity=ParityOptions())
    report = verify(out, source=None, options=options)
    assert report.verdict is Status.PASS, [c.summary for c in report.checks]
    write_report(report, out)
    return out


def test_what_strangers_load_is_the_model(hub, proven, tmp_path):
    assert judge(Output.open(proven)).verified
    ran = cli_runner.moeconv("push", proven)
    assert ran.code == 0, ran.err
    card = hub.text("README.md")
    assert "MaxText" in card and "same most likely token" in card
    compile(snippet(card, "vllm"), "card", "exec")

    script = tmp_path / "script.py"
    # The card's code and ours in one process: importing transformers is what takes the time.
    script.write_text(snippet(card, "transformers") + LOAD)
    close_session()
    done = stranger(hub, tmp_path / "home", script, "alice/model", proven)
    assert done.returncode == 0, done.stderr
    text, verdict = done.stdout.rstrip("\n").rsplit("\n", 1)
    assert text.startswith("Once upon a time") and len(text) > len("Once upon a time")
    assert verdict == "equal"
    assert any(s.route == "resolve" and "model.safetensors" in s.path for s in hub.seen)


def test_levels_that_real_runs_leave_out_do_not_pass(proven, tmp_path):
    """The gate against the reports that verify itself writes."""
    proven = outputs.copy(proven, tmp_path / "out")
    options = VerifyOptions(levels=("structure", "weights"))
    write_report(verify(proven, source=None, options=options), proven)
    assert "neither level logits nor level layers ran" in judge(Output.open(proven)).problem
    against = VerifyOptions(
        levels=("structure", "weights", "logits"),
        parity=ParityOptions(against=proven),
    )
    report = verify(proven, source=None, options=against)
    assert report.verdict is Status.PASS
    write_report(report, proven)
    assert "another model than MaxText's" in judge(Output.open(proven)).problem
    assert json.loads((proven / "verify.json").read_text())["verdict"] == "pass"
