"""Models that are wildly wrong get a verdict, and a report that is JSON."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import synthetic
from cli_runner import moeconv
from outputs_lab import change, scale

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import TensorError
from moeconv.untrusted import strict_json
from moeconv.verification.checks import Check, CheckFactory, Status, worst
from moeconv.verification.levels import Level
from moeconv.verification.levels.hidden import difference
from moeconv.verification.levels.parity import Parity, parity_checks
from moeconv.verification.measure.limits import KL
from moeconv.verification.measure.metrics import compare_logits
from moeconv.verification.measure.routing import Choice, compare_routing
from moeconv.verification.measure.tokens import RANDOM, TEXT, Rows
from moeconv.verification.report.files import write_report
from moeconv.verification.report.report import Report

NORM, EXPERT = "model.norm.weight", "model.layers.2.block_sparse_moe.experts.1.w2.weight"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Of two experts both are chosen, so that no next one has a margin."""
    root = tmp_path_factory.mktemp("two")
    made = synthetic.write(root / "run", "mixtral", sizes={"E": 2})
    convert(plan_conversion(str(made.run), ConvertOptions(config=made.config_file())), root / "out")
    return root / "out"


def verdict(out: Path, level: str, against: Path, code: int) -> dict:
    """What the command writes; every file of it is JSON or text without a trace."""
    args = ("--level", level, "--against", f"hf:{against}", "--tokens", "16")
    ran = moeconv("verify", out, *args)
    assert ran.code == code, ran.err + ran.out
    assert "Traceback" not in ran.err and "Warning" not in ran.err, ran.err
    return strict_json.loads((out / "verify.json").read_bytes())


# What is done to a right model; the checks that must fail at both levels.
WRONG = {
    "logits of 10^5": (lambda out: scale(out, NORM, 1e5), {"parity"}),
    "infinite perplexity and logits": (lambda out: scale(out, NORM, 1e38), {"parity"}),
    "NaN hidden states": (
        lambda out: change(out, EXPERT, lambda v: v * np.nan), {"parity", "router"}),
    "infinite router": (
        lambda out: change(
            out, "model.layers.1.block_sparse_moe.gate.weight", lambda v: v + np.float32(np.inf)),
        {"parity", "router"}),
}  # fmt: skip


@pytest.mark.parametrize("level", ["logits", "layers"])
def test_every_expert_chosen_is_a_verdict(two, tmp_path, level):
    out = tmp_path / "out"
    shutil.copytree(two, out)
    report = verdict(out, level, two, 0)
    assert report["levels"] == {level: "pass"}
    router = next(c for c in report["checks"] if c["name"] == "router")
    assert {one["margin"] for one in router["metrics"]["layers"]} == {None}
    assert "margin" not in router["summary"]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("level", ["logits", "layers"])
def test_a_wildly_wrong_model_fails(two, tmp_path, level, name):
    damage, checks = WRONG[name]
    out = tmp_path / "out"
    shutil.copytree(two, out)
    damage(out)
    report = verdict(out, level, two, 1)
    failed = {c["name"] for c in report["checks"] if c["status"] == "fail"}
    assert checks <= failed
    assert "not finite" in (out / "verify.md").read_text() or name == "logits of 10^5"


def test_a_reference_that_computes_no_numbers_is_no_verdict(two, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(two, other)
    change(other, EXPERT, lambda v: v * np.nan)
    shutil.copytree(two, tmp_path / "out")
    for level in ("logits", "layers"):
        args = ("--level", level, "--against", f"hf:{other}", "--tokens", "16")
        ran = moeconv("verify", tmp_path / "out", *args)
        assert ran.code == 2
        assert "not all finite" in ran.error and "nothing can be held against them" in ran.error
    assert not (tmp_path / "out" / "verify.json").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logits", "router"])
def test_one_bad_number_fails_even_where_a_near_tie_flipped(tmp_path, bad, where):
    """Positions with a flipped near-tie are judged apart, and must not hide it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, (2, 40)).astype(np.int32)
    right, router = rng.standard_normal((80, 30)), rng.standard_normal((2, 40, 4))
    router[0, 5] = [1.0, 0.5, 0.5 - 1e-9, 0.0]
    other_router, other = router.copy(), right.copy()
    other_router[0, 5, 1:3] = other_router[0, 5, 2:0:-1]
    if where == "logits":
        other[5, 3] = bad
    else:
        other_router[0, 20, 1] = bad
    compared = compare_logits(right, other, tokens.reshape(-1))
    routing = compare_routing({0: router}, {0: other_router}, choice=Choice(2), shape=(2, 40))
    if where == "logits":
        assert not routing.settled[0, 5], "the position is judged apart"
    rows = Rows(tokens, (TEXT, RANDOM), "a test")
    found = Parity(rows, compared, compared, compared, routing)
    checks = parity_checks(CheckFactory(Level.LOGITS), found, reference="MaxText")
    assert worst(checks) is Status.FAIL
    report = Report(verdict=worst(checks), levels={}, checks=checks, source="", files={})
    write_report(report, tmp_path)
    read = Report.read((tmp_path / "verify.json").read_bytes())
    # Of the plots only what is written has digests.
    written = report.model_copy(update={"beside": read.beside})
    assert read == written, "what is in memory is what is written"
    assert compared.lost == (where == "logits")


def test_hidden_states_that_are_no_numbers_fail_wherever_they_are():
    right = np.ones((1, 4, 3), np.float32)
    other = right.copy()
    other[0, 2, 1] = np.nan
    calm = np.array([[True, True, False, True]])
    assert difference(right, other, calm).largest == np.inf


def test_no_rounding_excuses_what_is_infinite():
    for value in (float("nan"), float("inf"), -float("inf")):
        assert KL.grade(value, float("inf")) is Status.FAIL


def test_a_reference_is_named_where_it_is_no_number():
    right = np.zeros((2, 3))
    right[1, 1] = np.inf
    with pytest.raises(TensorError, match=r"the reference's logits are not all finite .* 1 of 2"):
        compare_logits(right, np.zeros((2, 3)))


def test_what_a_check_says_can_be_written_and_shown():
    metrics = {"a": [1.0, float("nan")], "b": {"c": float("-inf")}, "d\x1b": "\ud800"}
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    made = CheckFactory(Level.STRUCTURE).passed(
        "files", "y" * 10_000 + "\x1b[2J", metrics={**metrics, "deep": deep}
    )
    assert made.metrics["a"] == [1.0, None] and made.metrics["b"] == {"c": None}
    text = strict_json.dumps(made.model_dump(mode="json")).decode()
    assert "\x1b" not in made.summary and len(made.summary) == 2000
    assert Check.model_validate(json.loads(text)) == made
