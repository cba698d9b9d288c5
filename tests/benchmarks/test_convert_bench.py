"""The bench runs, and its report says what the issue asks for; its figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import commands_but

BENCH = Path(__file__).parents[2] / "benchmarks" / "convert.py"


@pytest.mark.proof(
    "bench of converting",
    inputs=["benchmarks/convert.py"],
    without=commands_but("convert", "inspect"),
)
@pytest.mark.timeout(900)
def test_quick(tmp_path):
    report = tmp_path / "report.json"
    words = [BENCH, "--quick", "--repeat", "1", "--work", tmp_path / "work", "--json", report]
    ran = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(report.read_text())
    interleaved, all_moe = found["models"].values()
    floors = {"moeconv convert", "read floor", "write floor"}
    assert set(interleaved["runs"]) == floors
    assert set(all_moe["runs"]) == {*floors, "MaxText to_huggingface"}
    assert all_moe["ratios"]["wall / MaxText's exporter"]["value"] < 1
    assert set(found["growth"]) == {"1 layers", "2 layers"}
    runs = [r for part in (interleaved, all_moe) for r in part["runs"].values()]
    runs += [*found["growth"].values(), *found["start-up"].values()]
    for contender in runs:
        assert len(contender["runs"]) == 1
        assert all(run["wall"] > 0 and run["rss"] > 0 for run in contender["runs"])
    for title in (*found["models"], "wall / (read + write floor)", "moeconv --help"):
        assert title in ran.stdout
    assert not (tmp_path / "work" / "out").exists()
