"""The engine under kill -9 and signals at any moment: OUT is whole or not there."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import cli_runner
import pytest
import synthetic
from cli_runner import moeconv
from engine_lab import MOMENTS, beside, contents, interrupted, journaled, options, to

from moeconv.conversion.api import convert, plan_conversion
from moeconv.errors import OutputError
from moeconv.execution.mover import Mover
from moeconv.orbax.arrays import Reader

PROOF = pytest.mark.proof("kill points", without=cli_runner.commands_but("convert"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(big, expected, tmp_path, moment):
    out = tmp_path / "out"
    ran = interrupted(big, out, moment, signal.SIGKILL)
    assert ran.code in (-signal.SIGKILL, 0)
    if out.exists():
        assert contents(out) == expected
        return
    units = journaled(out)
    ran = moeconv("convert", big.run, out, "--config", big.run / "config.yml", "--resume")
    assert ran.code == 0, ran.err
    if units > 0:
        assert f"resuming: {units} of 82 units" in ran.err
    assert contents(out) == expected
    assert beside(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["begun", "middle"])
def test_interrupted_and_resumed(big, expected, tmp_path, moment, number):
    out = tmp_path / "out"
    ran = interrupted(big, out, moment, number)
    assert ran.code == 130
    assert ran.said == [f"interrupted: {out} is untouched; go on with --resume"]
    assert ran.out == ""
    assert not out.exists()
    assert journaled(out) > 0
    ran = moeconv("convert", big.run, out, "--config", big.run / "config.yml", "--resume", "-q")
    assert ran.code == 0, ran.err
    assert contents(out) == expected
    assert beside(out) == []


@pytest.mark.parametrize("times", [1, 3])
def test_interrupted_while_a_chunk_is_decoded(tiny, tmp_path, monkeypatch, times):
    """Files are closed when nobody writes to them any more, however often Ctrl-C is pressed."""
    read, began = Reader.read, threading.Event()

    def slow(self, box):
        began.set()
        time.sleep(0.2)
        return read(self, box)

    def press():
        began.wait(10)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.03)

    monkeypatch.setattr(Reader, "read", slow)
    before = set(threading.enumerate())
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        to(tiny, tmp_path / "out", jobs=1)
    thread.join()
    assert set(threading.enumerate()) <= before


def test_interrupted_before_it_begins(tmp_path):
    """Ctrl-C while the checkpoint is being looked at."""
    with socket.create_server(("127.0.0.1", 0)) as store:  # one that takes calls and never answers
        address = f"http://127.0.0.1:{store.getsockname()[1]}/run"
        process = cli_runner.spawn("convert", address, tmp_path / "out", "--quiet")
        call, _ = store.accept()
        with call:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err.split()) == (130, ["interrupted"])


def spread(total: int, tail: int, count: int) -> list[int]:
    """`count` numbers over all of it, and every one of the last `tail`."""
    return sorted({*range(0, total, max(1, total // count)), *range(max(0, total - tail), total)})


@pytest.mark.parametrize(("tail", "count"), [(14, 12), pytest.param(999, 1, marks=PROOF)])
def test_killed_at_any_call(crashes, tiny, tmp_path, tail, count):
    whole = crashes.convert(tiny, tmp_path / "whole", "--max-shard-size", "40kB")
    assert whole["code"] == 0
    expected = contents(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    points = spread(whole["calls"], tail, count)
    for number, die in enumerate([*points, ["fdatasync", 0], ["fdatasync", 1]]):
        out = tmp_path / f"out{number}"
        first = crashes.convert(tiny, out, "--max-shard-size", "40kB", die=die)
        assert first["code"] == -signal.SIGKILL, die
        if out.exists():
            assert contents(out) == expected, die
        else:
            second = crashes.convert(tiny, out, "--max-shard-size", "40kB", "--resume")
            assert second["code"] == 0
            assert contents(out) == expected, die
            assert beside(out) == [], die


@pytest.mark.parametrize(
    ("swap", "tail"),
    [(True, 13), (False, 13), pytest.param(True, 999, marks=PROOF),
     pytest.param(False, 999, marks=PROOF)],
)  # fmt: skip
def test_killed_while_overwriting(crashes, tiny, tmp_path, swap, tail):
    """The old model stays whole until the new one is."""
    old = {"model.safetensors": b"old", "config.json": b'{"model_type": "x"}', "notes.txt": b"mine"}

    def place(out: Path) -> Path:
        out.mkdir()
        for name, content in old.items():
            (out / name).write_bytes(content)
        return out

    flags = ("--overwrite",)
    whole = crashes.convert(tiny, place(tmp_path / "whole"), *flags, swap=swap)
    assert whole["code"] == 0
    new = contents(tmp_path / "whole")
    assert "notes.txt" not in new
    assert beside(tmp_path / "whole") == []
    ends = set()
    for die in spread(whole["calls"], tail, 2):
        out = place(tmp_path / f"out{die}")
        killed = crashes.convert(tiny, out, *flags, die=die, swap=swap)
        assert killed["code"] == -signal.SIGKILL, die
        if swap or out.exists():
            state = contents(out)
        else:  # between the two renames, for which such a file system leaves no other way
            state = contents(tmp_path / f".{out.name}.moeconv-old")
        assert state in (old, new), die
        ends.add(state == old)
        # A process that does nothing but look at OUT puts the old model back.
        if not out.exists():
            assert crashes.convert(tiny, out, swap=swap)["code"] == OutputError.exit_code
            assert contents(out) == old
        assert crashes.convert(tiny, out, *flags, "--resume", swap=swap)["code"] == 0
        assert contents(out) == new, die
        assert beside(out) == [], die
    assert ends == {True, False}


def test_stopped_while_pieces_are_put_together(small_units, tmp_path, monkeypatch):
    """An array whose pieces were spilled is done only when all of them are in their places."""
    checkpoint = synthetic.write(tmp_path / "run", split={"D": 4, "M": 2})
    checkpoint.config_file()
    to(checkpoint, tmp_path / "whole")
    prepared = plan_conversion(str(checkpoint.run), options(checkpoint, jobs=1))
    assert "decoder.layers.MoeBlock_0.wi_0" in {a.name for a in prepared.plan.assemblies}
    assemble, write = Mover.assemble, Mover._write
    assembling = threading.Event()

    def watched_assemble(self, spill):
        assembling.set()
        written = assemble(self, spill)
        assembling.clear()
        return written

    for stop_at in (1, 20, 90):
        writes = 0

        def watched_write(self, route, row, values, written, stop_at=stop_at):
            nonlocal writes
            written = write(self, route, row, values, written)
            writes += assembling.is_set()
            if writes == stop_at:
                signal.raise_signal(signal.SIGINT)
                assert self._stopped.wait(10)
            return written

        out = tmp_path / f"out{stop_at}"
        with monkeypatch.context() as patch:
            patch.setattr(Mover, "assemble", watched_assemble)
            patch.setattr(Mover, "_write", watched_write)
            with pytest.raises(KeyboardInterrupt):
                convert(prepared, out)
            assembling.clear()
        to(checkpoint, out, resume=True)
        assert contents(out) == contents(tmp_path / "whole"), stop_at
