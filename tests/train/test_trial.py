"""A run's trial: which step it keeps, what it writes, and that later plans go by it."""

import json
import shutil

import pytest
from moeconv_train import trial, trial_file
from moeconv_train.trial_file import Gradient
from plan_lab import planned
from train_lab import FP16, words

from moeconv.errors import ConfigError, TrainingError

BOTH = {"expert_tiles": True, "attention_blocks": True}
NEITHER = dict.fromkeys(BOTH, False)


def gradient(distance, norm=1.0):
    return Gradient(norm=norm, distance=distance, cosine=1.0)


def told(seconds=1.0, skipped=0, overflows=0, losses=(2.0,)):
    return {
        "parameters": ["a", "b"],
        "seconds": [seconds, 2 * seconds, seconds],
        "losses": list(losses),
        "skipped": skipped,
        "overflows": overflows,
        "device": "Tesla T4",
    }


def judged(patched, a=0.002, b=0.002):
    sides = {"fp32": told(), "stock": told(1.0), "patched": patched}
    stock = {"a": gradient(0.002), "b": gradient(0.002, norm=10)}
    ours = {"a": gradient(a), "b": gradient(b, norm=10)}
    return trial.judge(BOTH, sides, {"stock": stock, "patched": ours})


def test_a_right_and_faster_step_is_kept():
    found = judged(told(0.5), a=0.0039, b=0.0024)
    assert found.chosen == BOTH
    assert found.reason.startswith("the patches are kept: 0.500 s a step against 1.000 s")
    assert found.sides["patched"].distance == pytest.approx(0.0024, rel=0.02)


@pytest.mark.parametrize(
    ("patched", "distances", "why"),
    [
        (told(1.0), {}, "is not faster (1.000 s a step against 1.000 s)"),
        (told(0.5, skipped=1), {}, "skips others"),
        (told(0.5, overflows=1), {}, "skips others"),
        (told(0.5), {"a": 0.0041}, "too far from fp32's (a)"),  # one parameter of a hundredth
        (told(0.5), {"b": 0.0026}, "too far from fp32's (in all)"),
        (told(0.5), {"b": None}, "too far from fp32's (b)"),  # not finite
    ],
)
def test_else_maxtexts_own_is(patched, distances, why):
    found = judged(patched, **distances)
    assert found.chosen == NEITHER
    assert found.reason.startswith("MaxText's own step is kept: ") and why in found.reason


def test_what_is_below_fp16s_rounding_is_near():
    """As in fp32, where MaxText's own is the truth."""
    sides = {"fp32": told(), "stock": told(1.0), "patched": told(0.5)}
    both = {"stock": {"a": gradient(0.0)}, "patched": {"a": gradient(5e-6)}}
    assert trial.judge(BOTH, sides, both).chosen == BOTH


def test_later_plans_go_by_it_and_the_command_line_above_it(tmp_path):
    given = [f"base_output_directory={tmp_path}", "run_name=x"]

    def patches(*said):
        found = planned("llama3_moe_200m_tinystories", *given, *said).patches
        return {name: found[name] for name in BOTH}

    assert patches() == BOTH
    (tmp_path / "x").mkdir()
    judged(told(2.0)).write(tmp_path / "x")
    assert sorted(each.name for each in (tmp_path / "x").iterdir()) == ["trial.json"]
    assert trial_file.chosen(tmp_path / "x") == NEITHER == patches()
    assert patches("run.patches.expert_tiles=true") == {**NEITHER, "expert_tiles": True}


@pytest.mark.parametrize("content", ["", "[]", '{"chosen": {"a": true}}', '{"chosen": NaN}'])
def test_another_file_of_that_name_is_refused(tmp_path, content):
    (tmp_path / "trial.json").write_text(content)
    with pytest.raises(ConfigError, match=r"trial\.json: is not what a trial writes .* delete it"):
        trial_file.chosen(tmp_path)


def tried(tmp_path, launch):
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
    found = trial.begin(planned(*given), given, said.append, launch=launch, steps=1)
    return found, said


@pytest.mark.parametrize("failing", ["fp32", "patched"])
def test_a_side_that_cannot_be_run(tmp_path, failing):
    def launch(request, folder, log):
        if folder.name == failing:
            raise TrainingError("its process ended with 1")
        return told()

    file = tmp_path / "runs" / "x" / "trial.json"
    if failing == "patched":
        found, said = tried(tmp_path, launch)
        assert found.chosen == NEITHER == trial_file.chosen(file.parent)
        assert "the patched one cannot be run (its process ended with 1)" in said[-1]
    else:
        with pytest.raises(TrainingError, match="x: fp32 cannot be tried: its process ended"):
            tried(tmp_path, launch)
        assert not file.exists()


@pytest.fixture
def compiled_quickly():
    from fp16_lab import little_optimisation

    with little_optimisation():
        yield


@pytest.mark.maxtext
@pytest.mark.proof("trial of the patches")
@pytest.mark.usefixtures("compiled_quickly")
def test_maxtexts_steps_are_tried_and_a_wrong_patch_is_not_kept(tmp_path, monkeypatch):
    """The three real steps, in this process; then experts that give five per cent too much."""
    from moeconv_train import expert_tiles, trial_worker

    requests, done = {}, {}

    def launch(request, folder, log):
        """The patched side is said to be faster; the others are measured once."""
        kept = tmp_path / folder.name
        if folder.name in done and folder.name != "patched":
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            return done[folder.name]
        requests[folder.name] = request
        found = trial_worker.measure(request, folder)
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        done[folder.name] = {**found, "seconds": [0.5 if folder.name == "patched" else 1.0]}
        return done[folder.name]

    first, said = tried(tmp_path, launch)
    sides = first.sides
    assert first.chosen == BOTH, first.reason
    # 2^24 overflows at first, in both alike; fp32 has no scale.
    assert sides["stock"].skipped == sides["patched"].skipped > 0 == sides["fp32"].skipped
    assert 0 < sides["stock"].distance < 0.01 and 0 < sides["patched"].distance < 0.01
    names = set(sides["patched"].gradients)
    assert {"token_embedder.embedding", "decoder.layers.layers_1.MoeBlock_0.wo"} <= names
    assert all(each.cosine > 0.9999 for each in sides["patched"].gradients.values())
    assert sides["patched"].losses == pytest.approx(sides["stock"].losses, rel=1e-3)
    assert "dtype=float32" in requests["fp32"]["gradient"]
    assert "dtype=float16" in requests["patched"]["gradient"]
    assert "per_device_batch_size=1" in requests["patched"]["gradient"]
    assert json.loads((tmp_path / "runs" / "x" / "trial.json").read_text())["chosen"] == BOTH
    # A run that was tried is not tried again.
    again, said = tried(tmp_path, launch)
    assert again is None and "nothing to try" in said[-1]

    stock = expert_tiles.moe
    monkeypatch.setattr(expert_tiles, "moe", lambda *a, **k: 1.05 * stock(*a, **k))
    wrong, said = tried(tmp_path / "wrong", launch)
    assert wrong.chosen == NEITHER
    assert "too far from fp32's (" in said[-1]


@pytest.mark.proof("trial of the patches")
def test_a_side_is_a_process_of_its_own(tmp_path):
    with pytest.raises(TrainingError, match=r"ended with 1; .*trial\.log says why"):
        trial._process({"gradient": ["no_recipe"], "timed": [], "patches": {}, "steps": 0},
                       tmp_path, tmp_path / "trial.log")  # fmt: skip
    assert "'no_recipe' is no recipe" in (tmp_path / "trial.log").read_text()
