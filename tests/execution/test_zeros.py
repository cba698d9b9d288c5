"""A chunk that older Orbax did not store reads as zeros; a lost one must not pass for one."""

import json

import pytest
import synthetic

from moeconv.artifact.manifest import MANIFEST_NAME, Manifest
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import TensorError
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.weights import check_weights

NAME = "decoder.layers.MoeBlock_0.wi_0"
STORAGE = {
    "zarr2 files": {"ocdbt": False, "zarr3": False},
    "zarr3 files": {"ocdbt": False, "zarr3": True},
    "zarr3 in OCDBT": {"ocdbt": True, "zarr3": True},
}


def clear(arrays):
    """The first expert, which is a chunk of its own, is zero."""
    arrays[NAME][0] = 0


def write(folder, storage, *, zeros=False, change=clear):
    checkpoint = synthetic.write(
        folder / "run", sizes={"E": 2}, split={"E": 2}, zeros=zeros, change=change, **storage
    )
    if not zeros and storage == STORAGE["zarr2 files"] and change is clear:
        (checkpoint.items / f"params.params.{NAME}" / "0.0.0.0").unlink()  # has no fill value
    return checkpoint


def options(checkpoint, **more):
    return ConvertOptions(config=checkpoint.config_file(), **more)


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_a_chunk_that_may_be_lost_is_refused_by_name(tmp_path, storage):
    checkpoint = write(tmp_path, storage)
    prepared = plan_conversion(str(checkpoint.run), options(checkpoint))
    with pytest.raises(TensorError, match=rf"{NAME} \[0:1, .*--allow-missing-chunks"):
        convert(prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_who_insists_gets_zeros_and_never_a_pass(tmp_path, storage):
    checkpoint = write(tmp_path, storage)
    insisting = options(checkpoint, allow_missing_chunks=True)
    notes = []
    out = tmp_path / "out"
    convert(plan_conversion(str(checkpoint.run), insisting), out, note=notes.append)
    assert [n for n in notes if NAME in n and "not stored" in n]
    written = Manifest.model_validate_json((out / "moeconv_manifest.json").read_bytes())
    assert written.missing_chunks == {NAME: [[0, 0, 0, 0]]}
    assert [w for w in written.warnings if NAME in w]
    checks = check_weights(Candidate.open(out), jobs=1, memory=2**30)
    assert worst(checks) is Status.WARN

    whole = write(tmp_path / "whole", storage, zeros=True)
    convert(plan_conversion(str(whole.run), options(whole)), tmp_path / "same")
    name = "model.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (out / name).read_bytes()
    assert "missing_chunks" not in json.loads((tmp_path / "same" / MANIFEST_NAME).read_bytes())


def test_nothing_is_missing_where_no_chunk_is_zero(tmp_path):
    checkpoint = write(tmp_path, STORAGE["zarr2 files"], change=lambda arrays: None)
    for insists in (False, True):
        wanted = options(checkpoint, allow_missing_chunks=insists, overwrite=True)
        manifest = convert(plan_conversion(str(checkpoint.run), wanted), tmp_path / "out")
        assert not manifest.missing_chunks


def test_where_zeros_are_stored_nobody_can_insist(tmp_path):
    checkpoint = write(tmp_path, STORAGE["zarr2 files"], zeros=True)
    (checkpoint.items / f"params.params.{NAME}" / "0.0.0.0").unlink()
    insisting = options(checkpoint, allow_missing_chunks=True)
    with pytest.raises(TensorError, match="is damaged"):
        convert(plan_conversion(str(checkpoint.run), insisting), tmp_path / "out")
