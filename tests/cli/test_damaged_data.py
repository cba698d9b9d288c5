"""Damaged files of a checkpoint end in one sentence, and never in a model."""

import os
import shutil
from pathlib import Path

import pytest
import tensorstore as ts
import yaml
from checkpoints.envy import ENVY
from checkpoints.row import TIED
from cli_runner import moeconv
from refusals import WI_0, convert, out_of, refused

from moeconv.errors import NotACheckpointError, TensorError, UnsupportedError


def data_file(items: Path) -> Path:
    """The file that holds nearly everything of an OCDBT store."""
    return max(items.rglob("d/*"), key=lambda p: p.stat().st_size)


def cut(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def scribble(path: Path) -> None:
    """Ruins the head of a chunk, which every reader of it must notice."""
    raw = bytearray(path.read_bytes())
    raw[:8] = b"\x00" * 8
    path.write_bytes(raw)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [lambda path: cut(path, 0.95), lambda path: cut(path, 0.5), lambda path: cut(path, 0.0),
     Path.unlink, zeros],
    ids=["0.95", "0.5", "0.0", "gone", "zeros"],
)  # fmt: skip
def test_a_damaged_ocdbt_file(maxtext_lab, tmp_path, damage):
    """As MaxText wrote it: the index is in files of its own."""
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    run = tmp_path / "run"
    shutil.copytree(lab.run_dir, run)
    damage(data_file(run))
    config = tmp_path / "config.yml"
    config.write_text("decoder_block: envy\nnum_experts_per_tok: 2\n")
    out = tmp_path / "out"
    ran = moeconv("convert", run, out, "--config", config)
    items = run / "checkpoints" / "0" / "items"
    refused(ran, TensorError, str(items), "parameter ", "damaged", "use another step", out=out)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("manifest.ocdbt", "cut"),
        ("manifest.ocdbt", "zeros"),
        ("d/*", "gone"),
        ("d/*", "cut"),
        ("d/*", "zeros"),
    ],
)
def test_a_damaged_ocdbt_index(maxtext_lab, tmp_path, damage, pattern):
    """As MaxText wrote it."""
    run = tmp_path / "run"
    shutil.copytree(maxtext_lab.checkpoint(ENVY, TIED).run_dir, run)
    [path] = (run / "checkpoints" / "0" / "items").glob(pattern)
    raw = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else bytes(len(raw)))
    ran = moeconv("convert", run, tmp_path / "out")
    words = ("checkpoints/0/items", "the save is", "damaged")
    refused(ran, NotACheckpointError, *words, out=tmp_path / "out")


def test_without_the_merged_index_the_processes_parts_are_read(maxtext_lab, tmp_path):
    """They stay when Orbax merges them, and have it all."""
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    run = tmp_path / "run"
    shutil.copytree(lab.run_dir, run)
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(dict(lab.config)))
    assert moeconv("convert", run, tmp_path / "merged", "--config", config).code == 0
    (run / "checkpoints" / "0" / "items" / "manifest.ocdbt").unlink()
    ran = moeconv("convert", run, tmp_path / "parts", "--config", config)
    assert ran.code == 0
    assert "Orbax never merged what 1 process wrote" in ran.err
    one, other = (tmp_path / name / "model.safetensors" for name in ("merged", "parts"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("split", [{}, {"M": 2}])
def test_a_missing_chunk_of_an_ocdbt_store(made, tmp_path, zarr3, split):
    """Never zeros."""
    checkpoint = made(tmp_path, zarr3=zarr3, split=split)
    base = {"driver": "file", "path": f"{checkpoint.items}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = [k for k in store.list().result() if WI_0.encode() in k and b".z" not in k]
    [*_, last] = sorted(k for k in keys if b"zarr.json" not in k)
    store.delete_range(ts.KvStore.KeyRange(last, last + b"\0")).result()
    refused(convert(checkpoint), TensorError, WI_0, "missing", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("damage", "word"),
    [(lambda p: cut(p, 0.5), "ZSTD"), (lambda p: cut(p, 0.0), "ZSTD"),
     (scribble, "ZSTD"), (Path.unlink, "missing")],
    ids=["cut", "empty", "scribbled", "gone"],
)  # fmt: skip
def test_a_damaged_zarr_chunk(plain, damage, word):
    damage(plain.items / f"params.params.{WI_0}" / "0.0.0.0")
    sentence = refused(convert(plain), TensorError, WI_0, "damaged", out=out_of(plain))
    assert word.lower() in sentence.lower()


@pytest.mark.parametrize("jobs", [1, 4])
def test_damage_found_late_leaves_nothing(made, tmp_path, jobs):
    """The last of many arrays: most of the output is written by then."""
    checkpoint = made(tmp_path, scanned=False, ocdbt=False, zarr3=False)
    last = "decoder.layers_3.pre_self_attention_layer_norm.scale"
    scribble(checkpoint.items / f"params.params.{last}" / "0")
    ran = convert(checkpoint, "--jobs", jobs)
    refused(ran, TensorError, last, "damaged", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda p: cut(p, 0.3), NotACheckpointError, ["cannot be opened"]),
        (Path.unlink, NotACheckpointError, ["cannot be opened"]),
        (lambda p: p.write_text(p.read_text().replace("zstd", "frob")), NotACheckpointError,
         ["cannot be opened", "frob"]),
        (lambda p: p.write_text(p.read_text().replace("<f4", "<i4")), UnsupportedError,
         ["stored as int32", "float32, bfloat16, float16"]),
        (lambda p: p.write_text(p.read_text().replace("<f4", "<f8")), UnsupportedError,
         ["stored as float64"]),
        (lambda p: p.write_text(p.read_text().replace("24]", "23]")), TensorError, ["wi_"]),
    ],
    ids=["cut", "gone", "codec", "int32", "float64", "shape"],
)  # fmt: skip
def test_damaged_zarr_metadata(plain, change, error, words):
    change(plain.items / f"params.params.{WI_0}" / ".zarray")
    refused(convert(plain), error, *words, out=out_of(plain))
