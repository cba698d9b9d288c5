"""What of a run the manifest carries, so that a card can be written when the run is gone."""

import json

import synthetic

from moeconv.artifact.manifest import Manifest
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.maxtext.run_record import CURVE_POINTS, RunRecord


def write(folder, lines=(), *, run=None, step=9, **config):
    made = synthetic.write(folder / "run", "mixtral", step=step)
    sidecar = {
        "format": "moeconv-run",
        "version": 1,
        "maxtext_version": "0.2.5",
        "config": {**made.config, **config},
        "run": run,
    }
    (made.run / "moeconv_run.json").write_text(json.dumps(sidecar))
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (made.run / "metrics.jsonl").write_text(text)
    return made.run


def record(run, out) -> tuple[RunRecord, list[str]]:
    prepared = plan_conversion(str(run), ConvertOptions())
    manifest = convert(prepared, out)
    read = Manifest.model_validate_json((out / "moeconv_manifest.json").read_bytes())
    assert read == manifest and read.run is not None
    return read.run, manifest.warnings


def train(step, loss, **more):
    return {"kind": "train", "step": step, "loss": loss, **more}


def test_losses_up_to_the_converted_step(tmp_path):
    lines = [train(n, float(n), tokens=100 * n, skipped_steps=0) for n in range(1, 21)]
    lines += [{"kind": "eval", "step": n, "loss": n / 2} for n in (5, 10, 15)]
    found, _ = record(write(tmp_path, lines), tmp_path / "out")
    # Checkpoint 9 was saved when ten steps were done.
    assert (found.train.step, found.train.loss, found.train.tokens) == (10, 10.0, 1000)
    assert (found.evaluation.step, found.evaluation.loss) == (10, 5.0)
    assert [p.step for p in found.train_curve] == list(range(1, 11))
    assert [p.step for p in found.evaluation_curve] == [5, 10]


def test_a_long_curve_is_thinned_to_means(tmp_path):
    lines = [train(n, 1.0 + n % 2) for n in range(1, 2001)]
    found, _ = record(write(tmp_path, lines, step=1999), tmp_path / "out")
    assert len(found.train_curve) == CURVE_POINTS
    assert {p.loss for p in found.train_curve} == {1.5}
    assert found.train_curve[-1].step == 2000 and found.train.loss == 1.0
    assert (tmp_path / "out" / "moeconv_manifest.json").stat().st_size < 100_000


def test_damaged_lines_and_steps_that_ran_twice(tmp_path):
    lines = [
        train(1, 5.0),
        train(2, 4.0),
        '{"kind": "train", "st\n',  # cut off where the run was killed
        train(2, 3.5),  # trained again after resuming
        train(3, float("nan")),
        "\n",
    ]
    found, warnings = record(write(tmp_path, lines), tmp_path / "out")
    assert [(p.step, p.loss) for p in found.train_curve] == [(1, 5.0), (2, 3.5)]
    (warning,) = [w for w in warnings if "metrics.jsonl" in w]
    assert warning.startswith("3 lines")


def test_only_settings_that_a_card_tells_are_taken_over(tmp_path):
    run = write(
        tmp_path,
        run={"dataset": "a/b", "license": "mit", "wandb_key": "never"},
        steps=10,
        learning_rate=1e-3,
        packing=False,
        opt_type="adamw",
        run_name="never",
        base_output_directory="/never",
        adam_b2=None,
        adam_b1=["not a number"],
    )
    found, _ = record(run, tmp_path / "out")
    assert found.settings == {
        "steps": 10, "learning_rate": 1e-3, "opt_type": "adamw",
        "max_target_length": 64,
    }  # fmt: skip
    assert found.facts.dataset == "a/b" and found.facts.license == "mit"
    assert found.maxtext_version == "0.2.5"
    assert "never" not in (tmp_path / "out" / "moeconv_manifest.json").read_text()


def test_a_run_that_tells_nothing_and_an_old_manifest(tmp_path):
    run = write(tmp_path)
    (run / "metrics.jsonl").unlink()
    config = synthetic.write(tmp_path / "other", "mixtral").config_file()
    (run / "moeconv_run.json").unlink()
    convert(plan_conversion(str(run), ConvertOptions(config=config)), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "moeconv_manifest.json").read_text())
    assert content["run"] is None
    del content["run"]  # as moeconv wrote it before there was one
    assert Manifest.model_validate(content).run is None


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = write(tmp_path, [train(n, 1 / n) for n in range(1, 400)], step=500)
    for name in ("one", "two"):
        convert(plan_conversion(str(run), ConvertOptions()), tmp_path / name)
    one, two = ((tmp_path / n / "moeconv_manifest.json").read_bytes() for n in ("one", "two"))
    assert one == two
