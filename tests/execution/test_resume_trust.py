"""What an unfinished conversion left is trusted as far as it is what was written, no further."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import synthetic
from engine_lab import contents, options, partial
from safetensors import safe_open

from moeconv.conversion import api
from moeconv.errors import OutputError, StorageError
from moeconv.execution import journal


@pytest.fixture(scope="module", autouse=True)
def small():
    """As `small_units`, for the module: an array of some hundred bytes takes every path."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("moeconv.planning.units.UNIT_BYTES", 1)
        patched.setattr("moeconv.planning.slabs.BLOCK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Envy: each dense MLP is copied to every expert. D is split, so that arrays are spilled."""
    made = synthetic.write(
        tmp_path_factory.mktemp("trust") / "run", "envy", split={"D": 2}, sizes={"L": 2, "E": 2}
    )
    made.config_file()
    return made


def go_on(checkpoint, out, notes=None, **more):
    prepared = api.plan_conversion(str(checkpoint.run), options(checkpoint, resume=True, **more))
    return api.convert(prepared, out, note=(notes if notes is not None else []).append)


@pytest.fixture(scope="module")
def left(checkpoint, small):
    """Beside the run: a whole model, and what is left of a conversion that failed at the last."""

    def stop(*_):
        raise StorageError("the line went dead")

    go_on(checkpoint, checkpoint.run.parent / "whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(api, "_write_the_rest", stop)
        with pytest.raises(StorageError):
            go_on(checkpoint, checkpoint.run.parent / "out")
    return checkpoint.run.parent


@pytest.fixture
def unfinished(left, tmp_path):
    """An OUT with what was left of its conversion."""
    shutil.copytree(partial(left / "out"), partial(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def whole(left):
    return contents(left / "whole")


def count_units(monkeypatch):
    """The units that are read from now on."""
    read = []
    do = api.Engine._do
    monkeypatch.setattr(
        api.Engine, "_do", lambda self, unit, pool: (read.append(unit), do(self, unit, pool))
    )
    return read


def test_what_is_whole_is_not_done_again(checkpoint, unfinished, whole, monkeypatch):
    read, notes = count_units(monkeypatch), []
    go_on(checkpoint, unfinished, notes)
    assert not read
    assert not [n for n in notes if n.startswith("warning")]
    assert contents(unfinished) == whole


def test_a_flipped_byte_is_written_again_and_never_signed(
    checkpoint, unfinished, whole, monkeypatch
):
    """One in every tensor: copies, spilled arrays and filled ones among them."""
    path = partial(unfinished) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    places = json.loads(raw[8:header])
    del places["__metadata__"]
    rng = np.random.default_rng(0)
    for place in places.values():
        raw[header + rng.integers(*place["data_offsets"])] ^= 1 << rng.integers(8)
    path.write_bytes(raw)
    read, notes = count_units(monkeypatch), []
    go_on(checkpoint, unfinished, notes)
    assert len(read) > 10
    assert [n for n in notes if "was changed since" in n]
    assert contents(unfinished) == whole


def test_only_what_was_changed_is_done_again(checkpoint, unfinished, whole, monkeypatch):
    path = partial(unfinished) / "model.safetensors"
    name = "model.layers.0.input_layernorm.weight"
    with safe_open(path, framework="np") as file:
        assert name in file.keys()  # noqa: SIM118
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header + json.loads(raw[8:header])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)
    read = count_units(monkeypatch)
    go_on(checkpoint, unfinished)
    assert {unit.array.name for unit in read} == {
        "decoder.layers.layers_0.pre_self_attention_layer_norm.scale"
    }
    assert contents(unfinished) == whole


def signed(entry) -> bytes:
    """A line with the checksum that it would have."""
    return json.dumps({**entry, "sum": journal._sum(entry)}).encode()


def of_unit(**changes):
    """Makes a line of the journal into another one."""

    def change(line: bytes) -> bytes:
        entry = json.loads(line)
        del entry["sum"]
        return signed({**entry, **changes})

    return change


LINES = {
    "list": lambda line: b"[1, 2]",
    "null": lambda line: b"null",
    "text": lambda line: b'"unit"',
    "number": lambda line: b"7",
    "deep": lambda line: b"[" * 100_000,
    "no UTF-8": lambda line: b"\xff" + line,
    "no checksum": lambda line: json.dumps({"unit": 0, "chunks": []}).encode(),
    "another digest": lambda line: line.replace(b'", "', b'", ', 1).replace(b"0", b"1"),
    "unit beyond the plan": of_unit(unit=10**6),
    "negative unit": of_unit(unit=-1),
    "unit of text": of_unit(unit="0"),
    "chunks of text": of_unit(chunks="all"),
    "chunks of numbers": of_unit(chunks=[[0, "a"]]),
    "chunks beyond the array": of_unit(chunks=[[[9, 9, 9], "00"]]),
    "no chunks": of_unit(chunks=[]),
    "missing elsewhere": of_unit(missing=[[7]]),
    "written nothing": of_unit(written=None),
    "assembled elsewhere": lambda line: signed({"assembled": "x", "written": 0}),
    "assembled list": lambda line: signed({"assembled": [], "written": 0}),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("damage", LINES.values(), ids=LINES)
def test_a_damaged_journal_is_not_believed(checkpoint, unfinished, whole, damage, number):
    path = partial(unfinished) / journal.NAME
    lines = path.read_bytes().split(b"\n")
    lines[number] = damage(lines[1])
    path.write_bytes(b"\n".join(lines))
    notes = []
    go_on(checkpoint, unfinished, notes)
    assert [n for n in notes if f"line {number + 1} of the unfinished" in n]
    assert contents(unfinished) == whole


def test_another_digest_of_the_source_is_not_signed(checkpoint, unfinished, whole):
    """The digests of the source in the manifest come from the journal, too."""
    path = partial(unfinished) / journal.NAME
    raw = path.read_bytes()
    entry = json.loads(raw.split(b"\n")[1])
    digest = entry["chunks"][0][1]
    path.write_bytes(raw.replace(digest.encode(), digest[::-1].encode()))
    go_on(checkpoint, unfinished)
    assert contents(unfinished) == whole


@pytest.mark.parametrize("name", [journal.NAME, "model.safetensors"])
@pytest.mark.parametrize("how", ["symlink", "link", "mkfifo", "mkdir"])
def test_nothing_is_written_through_what_others_put_there(
    checkpoint, unfinished, whole, tmp_path, name, how
):
    """Files of the staging folder that lead elsewhere, or nowhere."""
    path, victim = partial(unfinished) / name, tmp_path / "victim"
    victim.write_bytes(path.read_bytes())
    before = victim.read_bytes()
    path.unlink()
    getattr(os, how)(*([victim, path] if "link" in how else [path]))
    with contextlib.suppress(OutputError):
        go_on(checkpoint, unfinished)
        assert contents(unfinished) == whole
    assert victim.read_bytes() == before
