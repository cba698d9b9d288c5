"""The report: a page whose tables are whole, plots of what ran, and nothing old beside them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from moeconv.errors import OutputError
from moeconv.verification.checks import Check, CheckFactory, Status, worst
from moeconv.verification.levels import Level
from moeconv.verification.levels.parity import Parity, parity_checks
from moeconv.verification.measure.limits import LIMITS
from moeconv.verification.measure.metrics import compare_logits
from moeconv.verification.measure.routing import Choice, compare_routing
from moeconv.verification.measure.tokens import RANDOM, TEXT, Rows
from moeconv.verification.report import files as written
from moeconv.verification.report.files import write_report
from moeconv.verification.report.markdown import limits_table, to_markdown, verdict_line
from moeconv.verification.report.plots import PLOTS
from moeconv.verification.report.report import Report

ROOT = Path(__file__).parents[3]
STRUCTURE, WEIGHTS, LAYERS = map(CheckFactory, (Level.STRUCTURE, Level.WEIGHTS, Level.LAYERS))


def parity(noise: float, *, experts: bool = True) -> list[Check]:
    """The checks of two rows whose logits differ by noise."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, (2, 40)).astype(np.int32)
    rows = Rows(tokens, (TEXT, RANDOM), "a test")
    right = rng.standard_normal((80, 30))
    other = compare_logits(right, right + noise * rng.standard_normal((80, 30)), rows.targets)
    router = {0: rng.standard_normal((2, 40, 4))} if experts else {}
    routing = compare_routing(router, router, choice=Choice(2), shape=(2, 40))
    found = Parity(rows, other, other, other, routing)
    return parity_checks(CheckFactory(Level.LOGITS), found, reference="MaxText")


def report(checks: list[Check]) -> Report:
    levels = {level: worst(c for c in checks if c.level == level) for level in
              dict.fromkeys(c.level for c in checks)}  # fmt: skip
    return Report(
        verdict=worst(checks), levels=levels, checks=checks, source="d1", files={"a": "b"}
    )


def tables(page: str) -> list[list[str]]:
    return [block.split("\n") for block in page.split("\n\n") if block.startswith("|")]


def cells(line: str) -> int:
    return len(re.split(r"(?<!\\)\|", line))


@pytest.mark.parametrize("experts", [True, False])
def test_every_row_has_as_many_cells_as_its_header(tmp_path, experts):
    checks = parity(1e-6, experts=experts)
    checks += [LAYERS.skipped("layers", "maxtext | is not installed")]
    page = to_markdown(report(checks), [])
    assert len(tables(page)) >= (4 if experts else 3)
    for table in tables(page):
        assert {cells(line) for line in table} == {cells(table[0])}, table[0]
    assert ("Routers" in page) == experts
    assert "perplexity" in page


def test_files_come_and_go_with_the_levels(tmp_path):
    paths = write_report(report(parity(1e-6)), tmp_path)
    names = {p.name for p in paths}
    assert names == {"verify.json", "verify.md", PLOTS[0], PLOTS[2]}
    for name in names & set(PLOTS):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and 3_000 < len(data) < 80_000
        assert name in (tmp_path / "verify.md").read_text()
    read = Report.model_validate(json.loads((tmp_path / "verify.json").read_text()))
    assert read.verdict is Status.PASS
    write_report(report([STRUCTURE.passed("files", "whole")]), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"verify.json", "verify.md"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("late", ["to_markdown", "to_json", "_write"])
def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch, error, late):
    write_report(report(parity(1e-6)), tmp_path)
    before = content(tmp_path)

    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr(written, late, fails)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_report(report([STRUCTURE.passed("files", "whole")]), tmp_path)
    assert content(tmp_path) == before


def test_the_first_line_says_where_it_fails():
    right, wrong = (
        STRUCTURE.passed("files", "fine"),
        WEIGHTS.failed("values", "one differs", tensors=["model.norm.weight"], layer=3),
    )
    assert verdict_line(report([right])).startswith("PASS")
    line = verdict_line(report([right, wrong]))
    assert line.startswith("FAIL") and "layer 3" in line and "model.norm.weight" in line
    assert to_markdown(report([right, wrong]), []).split("\n")[2] == f"**{line}**"


def test_noise_is_graded():
    assert worst(parity(1e-7)) is Status.PASS
    assert worst(parity(3e-3)) is Status.WARN
    assert worst(parity(1.0)) is Status.FAIL


def test_the_limits_are_those_of_the_code():
    text = limits_table()
    assert all(f"{limit.passing:g}" in text and limit.meaning in text for limit in LIMITS)
    assert text in (ROOT / "docs" / "parity.md").read_text()
    assert not any(math.isnan(limit.passing) for limit in LIMITS)
