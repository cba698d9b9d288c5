"""The code of docs/python-api.md runs as it stands."""

import re
from pathlib import Path

import outputs

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"


def test_the_code_of_the_page_runs(hub, tmp_path, monkeypatch, capsys):
    outputs.write_run(tmp_path / "runs" / "my-moe")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 11
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        if "pushed =" in block:  # what the page says has to be done before
            outputs.attest(tmp_path / "my-moe-hf", outputs.parity(1e-6))
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "my-moe-hf is not verified: neither level logits nor level layers ran" in said
    assert "runs/nothing-here" in said
    assert hub.repo("alice/my-moe").private
    assert names["made"].manifest.architecture == "MixtralForCausalLM"
