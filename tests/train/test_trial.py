"""A run's trial: which step it keeps, what it writes, and that later plans go by it."""

import json

import numpy as np
import pytest
from moeconv_train import trial, trial_file
from moeconv_train.trial_file import Side
from plan_lab import planned
from train_lab import FP16, words

from moeconv.errors import ConfigError, TrainingError

BOTH = {"expert_tiles": True, "attention_blocks": True}
NEITHER = dict.fromkeys(BOTH, False)


def side(seconds=1.0, skipped=0, overflows=0, whole=0.002, a=0.002, b=0.002):
    return Side(
        skipped=skipped,
        distance=whole,
        distances={"a": a, "b": b},
        seconds=[seconds, 2 * seconds, seconds],
        overflows=overflows,
    )


def judged(patched):
    return trial_file.judge(BOTH, side(), patched, "Tesla T4")


def test_a_right_and_faster_step_is_kept():
    found = judged(side(0.5, a=0.0039, whole=0.0024))
    assert found.chosen == BOTH
    assert found.reason.startswith("the patches are kept: 0.500 s a step against 1.000 s")


@pytest.mark.parametrize(
    ("patched", "why"),
    [
        (side(1.0), "is not faster (1.000 s a step against 1.000 s)"),
        (side(0.5, skipped=1), "skips others"),
        (side(0.5, overflows=1), "skips others"),
        (side(0.5, a=0.0041), "too far from fp32's (a)"),
        (side(0.5, whole=0.0026), "too far from fp32's (in all)"),
        (side(0.5, b=None, whole=None), "too far from fp32's (b)"),  # not finite
    ],
)
def test_else_maxtexts_own_is(patched, why):
    found = judged(patched)
    assert found.chosen == NEITHER
    assert found.reason.startswith("MaxText's own step is kept: ") and why in found.reason


def test_what_is_below_fp16s_rounding_is_near():
    """As in fp32, where MaxText's own is the truth."""
    stock, ours = side(whole=0.0, a=0.0, b=0.0), side(0.5, whole=5e-6, a=5e-6, b=5e-6)
    assert trial_file.judge(BOTH, stock, ours, "cpu").chosen == BOTH


def test_a_distance_is_relative_to_the_truth_and_finite_or_none():
    truth = {"a": np.float32([3, 0]), "b": np.float32([[0, 4]]), "zero": np.zeros(2, np.float32)}
    found = {**truth, "a": np.float32([3, 1])}
    assert trial._distance(found, truth) == pytest.approx(1 / 5)
    assert trial._distance({"a": found["a"]}, truth) == pytest.approx(1 / 3)
    assert trial._distance({"zero": truth["zero"]}, truth) == 0
    for wrong in ({"zero": found["a"]}, {"a": np.float32([np.inf, 0])}):
        assert trial._distance(wrong, truth) is None


def test_later_plans_go_by_it_and_the_command_line_above_it(tmp_path):
    given = [f"base_output_directory={tmp_path}", "run_name=x"]

    def patches(*said):
        found = planned("llama3_moe_200m_tinystories", *given, *said).patches
        return {name: found[name] for name in BOTH}

    assert patches() == BOTH
    (tmp_path / "x").mkdir()
    judged(side(2.0)).write(tmp_path / "x")
    assert sorted(each.name for each in (tmp_path / "x").iterdir()) == ["trial.json"]
    assert trial_file.chosen(tmp_path / "x") == NEITHER == patches()
    assert patches("run.patches.expert_tiles=true") == {**NEITHER, "expert_tiles": True}


@pytest.mark.parametrize("content", ["", "[]", '{"chosen": {"a": true}}', '{"chosen": NaN}'])
def test_another_file_of_that_name_is_refused(tmp_path, content):
    (tmp_path / "trial.json").write_text(content)
    with pytest.raises(ConfigError, match=r"trial\.json: is not what a trial writes .* delete it"):
        trial_file.chosen(tmp_path)


def tried(tmp_path):
    """The tiny recipe in fp16, tried; and what was said."""
    given = words(
        tmp_path / "runs",
        "x",
        **{**FP16, "dataset_type": "synthetic", "run.data.source": "none", "steps": 4},
        ici_data_parallelism=4,  # the test session's devices
        **{f"run.patches.{name}": "true" for name in BOTH},
    )
    said = []
    given = [word for word in given if not word.startswith("run.epochs")] + ["run.epochs=none"]
    return trial.begin(planned(*given), given, said.append, steps=1), said


def kind(given):
    """Which of the three steps a command line asks for."""
    if "dtype=float32" in given:
        return "fp32"
    return "patched" if "run.patches.expert_tiles=true" in given else "stock"


@pytest.mark.parametrize("failing", ["fp32", "patched"])
@pytest.mark.parametrize("error", [RuntimeError("no kernel"), SystemExit(3)])
def test_a_side_that_cannot_be_run(tmp_path, monkeypatch, failing, error):
    def gradient(given):
        if kind(given) == failing:
            raise error
        return {"a": np.ones(3, np.float32)}, 0

    monkeypatch.setattr(trial, "gradient", gradient)
    monkeypatch.setattr(trial, "timed", lambda given, steps: ([1.0], 0))
    why = "no kernel" if isinstance(error, RuntimeError) else "MaxText ended the process"
    if failing == "patched":
        found, said = tried(tmp_path)
        assert found.chosen == NEITHER == trial_file.chosen(tmp_path / "runs" / "x")
        assert "the patched one cannot be run (" in said[-1] and why in said[-1]
    else:
        with pytest.raises(TrainingError, match=f"x: .*{why}.*trial\\.log"):
            tried(tmp_path)
        assert not (tmp_path / "runs" / "x" / "trial.json").exists()


@pytest.fixture
def compiled_quickly():
    from fp16_lab import little_optimisation

    with little_optimisation():
        yield


@pytest.mark.maxtext
@pytest.mark.proof("trial of the patches")
@pytest.mark.usefixtures("compiled_quickly")
def test_maxtexts_steps_are_tried_and_a_wrong_patch_is_not_kept(tmp_path, monkeypatch):
    """The three real steps; then experts that give five per cent too much."""
    import jax
    from moeconv_train import expert_tiles

    asked, done, left = {}, {}, []
    real, measured, plan_run = trial.gradient, trial.timed, trial.start.plan_run

    def gradient(given):
        """The others are measured once."""
        asked.setdefault(kind(given), given)
        if kind(given) == "patched" or kind(given) not in done:
            done[kind(given)] = real(given)
        return done[kind(given)]

    def timed(given, count):
        """The patched side is said to be faster."""
        _, overflows = measured(given, count)
        return [0.5 if kind(given) == "patched" else 1.0], overflows

    def begun(given, **kwargs):
        left.append(len(jax.live_arrays()))
        return plan_run(given, **kwargs)

    monkeypatch.setattr(trial, "gradient", gradient)
    monkeypatch.setattr(trial, "timed", timed)
    monkeypatch.setattr(trial.start, "plan_run", begun)
    first, said = tried(tmp_path)
    assert left == 5 * [left[0]]  # nothing of the steps before is on the devices
    assert first.chosen == BOTH, first.reason
    # 2^24 overflows at first, in both alike; fp32 has no scale.
    assert first.stock.skipped == first.patched.skipped > 0 == done["fp32"][1]
    assert 0 < first.stock.distance < 0.01 and 0 < first.patched.distance < 0.01
    names = set(first.patched.distances)
    assert {"token_embedder.embedding", "decoder.layers.layers_1.MoeBlock_0.wo"} <= names
    assert "dtype=float16" in asked["patched"] and "per_device_batch_size=1" in asked["patched"]
    assert json.loads((tmp_path / "runs" / "x" / "trial.json").read_text())["chosen"] == BOTH
    # A run that was tried is not tried again.
    again, said = tried(tmp_path)
    assert again is None and "nothing to try" in said[-1]

    stock = expert_tiles.moe
    monkeypatch.setattr(expert_tiles, "moe", lambda *a, **k: 1.05 * stock(*a, **k))
    wrong, said = tried(tmp_path / "wrong")
    assert wrong.chosen == NEITHER
    assert "too far from fp32's (" in said[-1]
