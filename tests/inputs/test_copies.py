"""Copies of finished saves, parts that were never merged, and copies that are not whole."""

import json
import shutil

import pytest
import synthetic
from inputs_lab import converted, warnings

from moeconv.errors import MoeconvError, NotACheckpointError, TensorError
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.orbax.locate import locate

SPLIT = {"E": 2, "D": 2}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    return converted(synthetic.write(folder / "run"), folder / "out")[0]


def drop_marker(step, **changes):
    """As a copy of a local save of Orbax before its v1: there was no marker to copy."""
    (step / "commit_success.txt").unlink()
    path = step / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["item_handlers"] = {"items": "orbax.checkpoint.PyTreeCheckpointHandler"}
    path.write_text(json.dumps({**content, **changes}))


def test_a_copy_on_an_object_store_lacks_the_marker(tmp_path, address, usual):
    made = synthetic.write(tmp_path / "run", split=SPLIT)
    drop_marker(made.step_dir)
    assert warnings(converted(made, tmp_path / "local")[1]) == ()
    tensors, opened = converted(made, tmp_path / "out", f"{address}/run/checkpoints/0")
    assert tensors == usual
    [said] = [w for w in warnings(opened) if "commit_success.txt" in w]
    assert "every array of the model is whole" in said


def test_so_does_one_without_step_metadata(tmp_path, address, usual):
    made = synthetic.write(tmp_path / "run", split=SPLIT)
    drop_marker(made.step_dir)
    (made.step_dir / "_CHECKPOINT_METADATA").unlink()
    spec = f"{address}/run/checkpoints/0"
    told = ("normalization_layer_epsilon=1e-5",)  # nothing dates it
    assert converted(made, tmp_path / "out", spec, sets=told)[0] == usual


def test_a_copy_that_is_not_whole_is_refused_truly(tmp_path, address):
    made = synthetic.write(tmp_path / "run", split=SPLIT, parts=2)
    drop_marker(made.step_dir)
    shutil.rmtree(made.items / "ocdbt.process_1")
    for spec in (f"{address}/run/checkpoints/0", made.run):
        with pytest.raises(TensorError, match=r"no whole save.*of \S+ \d of \d chunks .*copy what"):
            open_checkpoint(str(spec))


def test_a_save_in_progress_on_an_object_store_is_none(tmp_path, address):
    made = synthetic.write(tmp_path / "run")
    drop_marker(made.step_dir, commit_timestamp_nsecs=None)
    with pytest.raises(NotACheckpointError, match="has no commit time, so its save did not finish"):
        locate(f"{address}/run/checkpoints/0")


def test_a_local_copy_without_the_marker_that_orbax_v1_leaves(tmp_path, usual):
    made = synthetic.write(tmp_path / "run")
    (made.step_dir / "commit_success.txt").unlink()
    tensors, opened = converted(made, tmp_path / "out")
    assert tensors == usual
    assert any("commit_success.txt" in warning for warning in warnings(opened))


def test_a_step_with_its_marker_is_preferred_to_one_of_unknown_end(tmp_path):
    synthetic.write(tmp_path / "run", step=4)
    newer = synthetic.write(tmp_path / "run", step=5)
    (newer.step_dir / "_CHECKPOINT_METADATA").unlink()
    (newer.step_dir / "commit_success.txt").rename(newer.items / "commit_success.txt")
    assert locate(str(tmp_path / "run")).number == 5  # items/ has the marker
    shutil.move(newer.items / "commit_success.txt", tmp_path)
    assert locate(str(tmp_path / "run")).number == 5  # renamed into place when it was complete


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("zarr3", [True, False], ids=["zarr3", "zarr2"])
def test_parts_that_were_never_merged(tmp_path, usual, parts, zarr3):
    made = synthetic.write(tmp_path / "run", split=SPLIT, parts=parts, zarr3=zarr3)
    assert not (made.items / "manifest.ocdbt").exists()
    tensors, opened = converted(made, tmp_path / "out")
    assert tensors == usual
    [said] = [w for w in warnings(opened) if "never merged" in w]
    assert f"{parts} process" in said


def test_parts_at_an_address(tmp_path, address, usual):
    made = synthetic.write(tmp_path / "run", split=SPLIT, parts=2)
    tensors, _ = converted(made, tmp_path / "out", f"{address}/run/checkpoints/0")
    assert tensors == usual


@pytest.mark.parametrize("lost", [0, 1])
def test_a_part_that_is_missing_between_others(tmp_path, address, lost):
    """Behind the gap parts are still found, also where a web server lists nothing."""
    made = synthetic.write(tmp_path / "run", split=SPLIT, parts=3)
    shutil.rmtree(made.items / f"ocdbt.process_{lost}")
    said = rf"process_{lost} is not there, while number 2 is, and of \S+ \d of \d chunks"
    for spec in (made.run, f"{address}/run/checkpoints/0"):
        with pytest.raises(TensorError, match=said):
            open_checkpoint(str(spec))


def test_a_missing_part_with_the_metadata_of_arrays(tmp_path, address):
    made = synthetic.write(tmp_path / "run", parts=1)
    shutil.copytree(made.items / "ocdbt.process_0", made.items / "ocdbt.process_1")
    other = synthetic.write(tmp_path / "other", change=lambda a: a.pop(min(a)), parts=1)
    shutil.rmtree(made.items / "ocdbt.process_0")
    shutil.rmtree(made.items / "ocdbt.process_1")
    shutil.copytree(other.items / "ocdbt.process_0", made.items / "ocdbt.process_1")
    for spec in (made.run, f"{address}/run/checkpoints/0"):
        with pytest.raises(NotACheckpointError, match=r"process_0 is not there, while number 1 is"):
            open_checkpoint(str(spec))


@pytest.mark.parametrize(
    "names", [("2", "5"), ("replica_0", "0"), ("pwcontroller", "0"), ("pwcontroller", "replica_1")]
)
def test_parts_of_any_name(tmp_path, address, usual, names):
    """A process that wrote nothing leaves no part; replicas and Pathways have other names."""
    made = synthetic.write(tmp_path / "run", split=SPLIT, parts=2)
    for number in (0, 1):
        (made.items / f"ocdbt.process_{number}").rename(made.items / f"part{number}")
    for number, name in enumerate(names):
        (made.items / f"part{number}").rename(made.items / f"ocdbt.process_{name}")
    for number, spec in enumerate((made.run, f"{address}/run/checkpoints/0")):
        tensors, opened = converted(made, tmp_path / f"out{number}", spec)
        assert tensors == usual
        [said] = [w for w in warnings(opened) if "never merged" in w]
        assert ("not there" in said) == (names == ("2", "5") or "replica_1" in names)


def test_a_part_that_is_all_there_is_of_a_save(tmp_path, address):
    made = synthetic.write(tmp_path / "run", parts=1)
    shutil.rmtree(made.items / "ocdbt.process_0")
    for spec in (made.run, f"{address}/run/checkpoints/0"):
        with pytest.raises(NotACheckpointError, match=r"no manifest.ocdbt and no ocdbt.process_"):
            open_checkpoint(str(spec))


def test_parts_of_two_saves_are_not_mixed(tmp_path):
    one = synthetic.write(tmp_path / "one", parts=1)
    other = synthetic.write(tmp_path / "other", parts=1, seed=1)
    shutil.copytree(other.items / "ocdbt.process_0", one.items / "ocdbt.process_1")
    with pytest.raises(NotACheckpointError, match=r"process_0 and ocdbt.process_1 both have"):
        open_checkpoint(str(one.run))


@pytest.mark.parametrize("ocdbt", [True, False], ids=["ocdbt", "files"])
def test_a_merged_save_whose_part_was_not_copied(tmp_path, ocdbt):
    """Each machine of a run may have written to a disk of its own."""
    made = synthetic.write(tmp_path / "run", split=SPLIT, ocdbt=ocdbt)
    if ocdbt:
        data = max((made.items / "d").iterdir(), key=lambda path: path.stat().st_size)
    else:
        folder = made.items / "params.params.decoder.layers.MoeBlock_0.wi_0"
        data = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    data.unlink()
    with pytest.raises(MoeconvError, match=r"is damaged|cannot be|not stored"):
        converted(made, tmp_path / "out")


def test_a_lost_chunk_that_may_be_zeros_is_refused_unless_the_user_insists(tmp_path):
    made = synthetic.write(tmp_path / "run", ocdbt=False, zarr3=False, zeros=False, split=SPLIT)
    path = made.items / "_METADATA"
    content = json.loads(path.read_text())
    del content["store_array_data_equal_to_fill_value"]
    path.write_text(json.dumps(content))
    folder = made.items / "params.params.decoder.layers.MoeBlock_0.wi_0"
    next(each for each in sorted(folder.iterdir()) if each.name[0].isdigit()).unlink()
    with pytest.raises(TensorError, match=r"is not stored; .*--allow-missing-chunks"):
        converted(made, tmp_path / "out")
    _, opened = converted(made, tmp_path / "zeros", allow_missing_chunks=True)
    assert opened.arrays.missing == {"decoder.layers.MoeBlock_0.wi_0": (3, 4)}
