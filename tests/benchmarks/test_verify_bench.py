"""The bench of `verify` runs, and its report says what docs/performance.md quotes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import commands_but

BENCH = Path(__file__).parents[2] / "benchmarks" / "verify.py"
GOALS = {
    "level weights, wall / read floor",
    "level logits, seconds",
    "level layers, GB beyond imports",
}


@pytest.mark.proof(
    "bench of verifying",
    inputs=["benchmarks/verify.py"],
    without=commands_but("convert", "inspect", "verify"),
)
@pytest.mark.timeout(900)
def test_quick(tmp_path):
    report = tmp_path / "report.json"
    words = [BENCH, "--quick", "--repeat", "1", "--work", tmp_path / "work", "--json", report]
    ran = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(report.read_text())["goals"]
    assert set(found) == GOALS
    assert all(one["value"] > 0 for one in found.values())
    # Both models are tiny: what is left is what the level takes whatever the model.
    assert found["level layers, GB beyond imports"]["value"] < 1
    for title in GOALS:
        assert title in ran.stdout
