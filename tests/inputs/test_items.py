"""A step's item, whatever it is called, and what belongs to the step."""

import json
import shutil

import numpy as np
import orbax_writer
import pytest
import synthetic
from inputs_lab import as_leaf, converted

from moeconv.errors import NotACheckpointError
from moeconv.orbax.locate import ITEMS, OTHER_ITEMS, locate

ADAM = {("opt_state", "0", "mu"): np.ones(3, np.float32)}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    return converted(synthetic.write(folder / "run", step=12), folder / "out")[0]


@pytest.mark.parametrize("item", [*ITEMS, "weights", ""])
def test_an_item_of_any_name(tmp_path, usual, item):
    made = synthetic.write(tmp_path / "run", step=12, item=item)
    for number, spec in enumerate([made.run, made.run / "checkpoints", made.step_dir, made.items]):
        step = locate(str(spec))
        assert (step.items.local, step.folder.local) == (made.items, made.step_dir)
        assert (step.number, step.scan_layers) == (12, True)
        assert [folder.local for folder in step.beside] == [
            made.step_dir, made.run / "checkpoints", made.run,
        ]  # fmt: skip
        assert converted(made, tmp_path / f"out{number}", spec)[0] == usual


@pytest.mark.parametrize("item", ["items", "state", "model_params"])
def test_an_item_at_an_address(tmp_path, address, item):
    made = synthetic.write(tmp_path / "run", step=12, item=item)
    place = made.step_dir.relative_to(tmp_path)
    for spec in (f"{address}/{place}", f"{address}/{place}/{item}"):
        step = locate(spec)
        assert (step.number, step.scan_layers) == (12, True)
        assert str(step.items) == f"{address}/{place}/{item}"


def test_the_run_s_sidecar_is_found_from_an_item(tmp_path):
    made = synthetic.write(tmp_path / "run", item="state")
    sidecar = {"format": "moeconv-run", "version": 1, "config": dict(made.config)}
    (made.run / "moeconv_run.json").write_text(json.dumps(sidecar))
    from moeconv.maxtext.checkpoint import open_checkpoint

    opened = open_checkpoint(str(made.items))
    assert opened.sidecar.folder.local == made.run


def test_the_training_engine_s_other_items_are_left_alone(tmp_path, usual):
    """Gradients have the very tree of the parameters."""
    made = synthetic.write(
        tmp_path / "run", step=12, item="model_params", rename=as_leaf(value=True)
    )
    for name in OTHER_ITEMS:
        shutil.copytree(made.items, made.step_dir / name)
    assert converted(made, tmp_path / "out")[0] == usual
    with pytest.raises(
        NotACheckpointError, match=r"accumulated_grads holds gradients, not the mod"
    ):
        locate(str(made.step_dir / "accumulated_grads"))


def test_two_items_that_may_be_meant(tmp_path):
    made = synthetic.write(tmp_path / "run")
    shutil.copytree(made.items, made.step_dir / "state")
    with pytest.raises(NotACheckpointError, match=r"both .*items and .*state may be what is meant"):
        locate(str(made.run))
    assert locate(str(made.step_dir / "state")).number == 0


@pytest.mark.parametrize(
    "name", ["before_20240101", "ckpt_12", "9000.bak", "step_9000", "９", "1e9", "-1", "+9", "9 "]
)
def test_what_only_looks_like_a_step_is_none(tmp_path, name):
    made = synthetic.write(tmp_path / "run", step=12)
    shutil.copytree(made.step_dir, made.step_dir.with_name(name))
    assert locate(str(made.run)).number == 12
    assert locate(str(made.step_dir.with_name(name))).number is None
    shutil.rmtree(made.step_dir)
    with pytest.raises(NotACheckpointError, match="can be given itself") as caught:
        locate(str(made.run))
    assert "unfinished" not in str(caught.value)


def test_a_parameters_only_directory_with_a_number(tmp_path, usual):
    made = synthetic.write(tmp_path / "run", step=12, item="", beside=ADAM)
    assert converted(made, tmp_path / "out", made.step_dir)[0] == usual


def test_a_finished_step_without_any_item_is_not_called_unfinished(tmp_path):
    made = synthetic.write(tmp_path / "run", step=12)
    (made.items / "_METADATA").unlink()
    for spec in (made.run, made.step_dir):
        with pytest.raises(NotACheckpointError, match=r"items/ has no _METADATA.*copy") as caught:
            locate(str(spec))
        assert "unfinished" not in str(caught.value)


def test_steps_are_told_by_number(tmp_path):
    for step in (7, 100, 99):
        synthetic.write(tmp_path / "run", step=step)
    assert locate(str(tmp_path / "run")).number == 100
    bare = orbax_writer.write(tmp_path / "bare", {("decoder", "x"): np.ones(2, np.float32)})
    assert locate(str(bare)).number is None
