"""Arrays that are stored and not named, more places than one, and what is read as zeros."""

import json
import shutil

import numpy as np
import pytest
import synthetic

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import NotACheckpointError, TensorError
from moeconv.maxtext.checkpoint import open_checkpoint

STORAGE = pytest.mark.parametrize(
    "storage",
    [{"ocdbt": o, "zarr3": z} for o in (True, False) for z in (True, False)],
    ids=lambda s: "-".join(name for name, on in s.items() if on) or "zarr2",
)
HEAD = "logits_dense"
BIAS = ("params", "params", "decoder", "layers", "MoeBlock_0", "gate", "bias")


def change(made, edit):
    """Edits `_METADATA`."""
    path = made.items / "_METADATA"
    content = json.loads(path.read_text())
    edit(content["tree_metadata"])
    path.write_text(json.dumps(content))


def forget(entries, word):
    for name in [name for name in entries if word in name]:
        del entries[name]


def empty(entries, word):
    for name in [name for name in entries if word in name]:
        entries[name]["value_metadata"]["value_type"] = "None"


@STORAGE
@pytest.mark.parametrize("edit", [forget, empty])
@pytest.mark.parametrize("word", [HEAD, "bias"])
def test_an_array_that_the_metadata_pass_over_is_refused(tmp_path, storage, edit, word):
    beside = {BIAS: np.ones((4, 4), np.float32)} if word == "bias" else {}
    made = synthetic.write(tmp_path / "run", tied=False, beside=beside, **storage)
    change(made, lambda entries: edit(entries, word))
    with pytest.raises(TensorError, match=rf"_METADATA does not name.*{word}"):
        open_checkpoint(str(made.run), config=made.config_file())


@pytest.mark.parametrize(
    "leaf",
    [
        ("step", "decoder", "MoeBlock_0", "router_bias"),
        ("nnx_aux", "rngs", "decoder", "gate", "count"),
        ("nnx_aux", "rngs", "decoder", "gate", "dropout", "key"),
    ],
    ids=".".join,
)
def test_names_like_those_of_a_training_are_not_enough(tmp_path, leaf):
    made = synthetic.write(tmp_path / "run", beside={leaf: np.ones((4, 4), np.float32)})
    with pytest.raises(TensorError, match=r"outside of params\.params"):
        open_checkpoint(str(made.run), config=made.config_file())


@pytest.mark.parametrize("zarr3", [True, False])
def test_what_a_missing_chunk_reads_as_is_zero(tmp_path, zarr3):
    made = synthetic.write(tmp_path / "run", ocdbt=False, zarr3=zarr3, zeros=False, split={"E": 2})
    for path in made.items.glob("*wi_0/zarr.json" if zarr3 else "*wi_0/.zarray"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fill_value": 1.0}))
    options = ConvertOptions(config=made.config_file(), allow_missing_chunks=True)
    with pytest.raises(TensorError, match="has the fill value 1"):
        convert(plan_conversion(str(made.run), options), tmp_path / "out")


@pytest.mark.parametrize(
    "other",
    ["items", "99", "checkpoints/0007"],
    ids=["parameters beside the steps", "a step beside the steps", "one number twice"],
)
def test_of_two_that_may_be_meant_none_is_taken(tmp_path, other):
    made = synthetic.write(tmp_path / "run", step=7)
    config = made.config_file()
    source = made.items if other == "items" else made.step_dir
    shutil.copytree(source, made.run / other)
    with pytest.raises(NotACheckpointError, match="may be what is meant"):
        open_checkpoint(str(made.run), config=config)
    assert open_checkpoint(str(made.step_dir), config=config).step.number == 7


def test_a_sidecar_above_a_named_folder_is_not_its_own(tmp_path):
    made = synthetic.write(tmp_path / "run", step=7)
    mine = tmp_path / "mine"
    shutil.copytree(made.items, mine / "items")
    (tmp_path / "moeconv_run.json").write_text("{}")
    assert open_checkpoint(str(mine), config=made.config_file()).sidecar is None
    assert open_checkpoint(str(mine), config=made.config_file()).resolution.warnings == ()
