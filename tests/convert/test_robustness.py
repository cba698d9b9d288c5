"""The engine under kill -9, signals, full disks and other processes: OUT is whole or not there."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cli_runner
import numpy as np
import orbax_writer
import pytest
import synthetic
import tensorstore as ts
from cli_runner import moeconv
from maxtext_lab import ENVY, TIED
from safetensors import safe_open

from moeconv.convert import digest, scatter, staging, work
from moeconv.convert.api import ConvertOptions, convert, plan_conversion
from moeconv.convert.engine import Engine
from moeconv.errors import MemoryLimitError, OutputError
from moeconv.hf.safetensors import payload
from moeconv.mapping.ops import DTYPES
from moeconv.orbax.arrays import Reader

MIB = 2**20


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def beside(out: Path) -> list[str]:
    """What moeconv has left beside OUT."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}."))


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.moeconv-partial"


def tensors(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            names = file.keys()
            found |= {name: file.get_tensor(name).tobytes() for name in names}
    return found


def options(checkpoint, **more) -> ConvertOptions:
    return ConvertOptions(config=checkpoint.run / "config.yml", **{"jobs": 2, **more})


def to(checkpoint, out: Path, **more):
    """Converts in this process."""
    return convert(plan_conversion(str(checkpoint.run), options(checkpoint, **more)), out)


@pytest.fixture
def small_units(monkeypatch):
    """A unit is one chunk, and a block a few rows, so that a small array takes every path."""
    monkeypatch.setattr("moeconv.convert.plan.UNIT_BYTES", 1)
    monkeypatch.setattr(work, "BLOCK_BYTES", 256)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 256)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """100 kB, 13 arrays."""
    checkpoint = synthetic.write(tmp_path_factory.mktemp("tiny") / "run", "envy")
    checkpoint.config_file()
    return checkpoint


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """111 MB in 82 arrays, so in as many units."""
    sizes = {"L": 8, "V": 4096, "D": 256, "M": 1024, "h": 64}
    run = tmp_path_factory.mktemp("big") / "run"
    checkpoint = synthetic.write(run, scanned=False, sizes=sizes)
    checkpoint.config_file()
    return checkpoint


@pytest.fixture(scope="module")
def expected(big, tmp_path_factory):
    """What an uninterrupted conversion of `big` writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    to(big, out)
    return contents(out)


def test_the_writer_of_these_tests_writes_what_maxtext_writes(maxtext_lab, tmp_path):
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    arrays = {tuple(name.split(".")): value for name, value in lab.params.items()}
    step = orbax_writer.write(tmp_path / "run" / "checkpoints" / "0", arrays, scan_layers=True)
    sets = ("decoder_block=envy", "num_experts_per_tok=2")
    config = tmp_path / "config.yml"
    config.write_text("max_target_length: 64\n")
    prepared = [
        plan_conversion(str(path), ConvertOptions(config=config, sets=sets))
        for path in (lab.step_dir, step)
    ]
    real, ours = (p.checkpoint for p in prepared)
    assert ours.arrays.info == real.arrays.info
    assert ours.tree == real.tree
    manifests = [convert(p, tmp_path / f"out{n}") for n, p in enumerate(prepared)]
    assert manifests[0].source.digest == manifests[1].source.digest
    assert tensors(tmp_path / "out0") == tensors(tmp_path / "out1")


# --- kill -9 ------------------------------------------------------------------------------------


def journaled(out: Path) -> int:
    """Units that the journal has."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (partial(out) / "journal.jsonl").read_bytes().count(b"\n") - 1
    return -1


MOMENTS = {
    "claimed": lambda out: partial(out).exists(),
    "begun": lambda out: journaled(out) >= 1,
    "early": lambda out: journaled(out) >= 8,
    "middle": lambda out: journaled(out) >= 40,
    "late": lambda out: journaled(out) >= 75,
    "publishing": lambda out: (partial(out) / "config.json").exists() or out.exists(),
}


def interrupted(checkpoint, out: Path, moment: str, number: int, *flags: str) -> cli_runner.Ran:
    """Starts a conversion and sends it a signal at a moment; again, if that came too late."""
    config = checkpoint.run / "config.yml"
    args = ("convert", checkpoint.run, out, "--config", config, "--jobs", 1, "--quiet", *flags)
    for _ in range(10):
        process = cli_runner.spawn(*args)
        while process.poll() is None and not MOMENTS[moment](out):
            time.sleep(0.0003)
        process.send_signal(number)
        said, err = process.communicate(timeout=60)
        if process.returncode != 0 or moment == "publishing":
            break
        shutil.rmtree(out)
    return cli_runner.Ran(process.returncode, said, err)


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


def test_interrupted_before_it_begins(tiny, tmp_path):
    """Ctrl-C while the checkpoint is being looked at."""
    source = tmp_path / "pipe" / "_METADATA"
    source.parent.mkdir()
    os.mkfifo(source)
    process = cli_runner.spawn("convert", source.parent, tmp_path / "out")
    with source.open("wb"):  # it waits in reading this
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.split()) == (130, ["interrupted"])


class Crashes:
    """`crash_server.py`, asked from here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("crash_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=cli_runner.environment(),
        )

    def convert(self, checkpoint, out: Path, *flags: str, die=None, swap=True):
        config = checkpoint.run / "config.yml"
        argv = ["convert", checkpoint.run, out, "--config", config, "--jobs", 2, *flags]
        request = {"argv": [str(a) for a in argv], "die": die, "swap": swap}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def leave_unfinished(self, checkpoint, out: Path) -> None:
        """Dies when every unit is in the journal and config.json is about to be synced."""
        units = len(checkpoint.arrays)
        self.convert(checkpoint, out, die=["fsync", units + 1])
        assert journaled(out) == units

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def crashes():
    server = Crashes()
    yield server
    server.close()


def spread(total: int, tail: int, count: int) -> list[int]:
    """`count` numbers over all of it, and every one of the last `tail`."""
    return sorted({*range(0, total, max(1, total // count)), *range(max(0, total - tail), total)})


@pytest.mark.parametrize(
    ("tail", "count"), [(14, 12), pytest.param(999, 1, marks=pytest.mark.slow)]
)
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
    [(True, 13), (False, 13), pytest.param(True, 999, marks=pytest.mark.slow),
     pytest.param(False, 999, marks=pytest.mark.slow)],
)  # fmt: skip
def test_killed_while_overwriting(crashes, tiny, tmp_path, swap, tail):
    """The old model stays whole until the new one is."""
    old = {"model.safetensors": b"old", "config.json": b"{}", "notes.txt": b"mine"}

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
    """An array whose pieces were parked is done only when all of them are in their places."""
    checkpoint = synthetic.write(tmp_path / "run", split={"D": 4, "M": 2})
    checkpoint.config_file()
    to(checkpoint, tmp_path / "whole")
    prepared = plan_conversion(str(checkpoint.run), options(checkpoint, jobs=1))
    assert "decoder.layers.MoeBlock_0.wi_0" in prepared.plan.parked
    settle, write = Engine._settle, Engine._write
    settling = threading.Event()

    def watched_settle(self, name):
        settling.set()
        settle(self, name)
        settling.clear()

    for stop_at in (1, 20, 90):
        writes = 0

        def watched_write(self, route, row, values, stop_at=stop_at):
            nonlocal writes
            write(self, route, row, values)
            writes += settling.is_set()
            if writes == stop_at:
                signal.raise_signal(signal.SIGINT)
                assert self._stop.wait(10)

        out = tmp_path / f"out{stop_at}"
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_settle", watched_settle)
            patch.setattr(Engine, "_write", watched_write)
            with pytest.raises(KeyboardInterrupt):
                convert(prepared, out)
            settling.clear()
        to(checkpoint, out, resume=True)
        assert contents(out) == contents(tmp_path / "whole"), stop_at


def test_a_journal_with_a_cut_line(big, expected, tmp_path):
    out = tmp_path / "out"
    interrupted(big, out, "middle", signal.SIGKILL)
    journal = partial(out) / "journal.jsonl"
    for cut in (7, 3000):
        os.truncate(journal, journal.stat().st_size - cut)
    left = journal.read_text().count("\n") - 1
    manifest = to(big, out, resume=True)
    assert left > 10
    assert set(manifest.files) == set(expected) - {"moeconv.json"}
    assert contents(out) == expected


def test_a_staged_file_that_is_gone(tiny, crashes, tmp_path):
    """The journal says what was written; where the file itself is not there, it is not believed."""
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    (partial(out) / "model.safetensors").unlink()
    with pytest.raises(OutputError, match="is gone or cut; begin anew without --resume"):
        to(tiny, out, resume=True)
    to(tiny, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags",
    [("--dtype", "bfloat16"), ("--untie",), ("--max-shard-size", "30kB"), ("--allow-nonfinite",),
     ("--set", "rope_max_timescale=1e4"), ("--target", "ernie4_5_moe")],
)  # fmt: skip
def test_resuming_with_other_options(tiny, crashes, tmp_path, flags):
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    before = contents(partial(out))
    config = ("--config", tiny.run / "config.yml")
    ran = moeconv("convert", tiny.run, out, *config, *flags, "--resume")
    assert ran.code == OutputError.exit_code
    assert "of another checkpoint or with other options" in ran.error
    assert "leave out --resume to begin anew" in ran.error
    assert contents(partial(out)) == before, "what was done is not lost by the mistake"
    assert moeconv("convert", tiny.run, out, *config, "--resume").code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_resuming_another_checkpoint(tiny, crashes, tmp_path):
    out = tmp_path / "out"
    crashes.leave_unfinished(tiny, out)
    other = synthetic.write(tmp_path / "other", "envy", seed=1)
    other.config_file()
    with pytest.raises(OutputError, match="of another checkpoint"):
        to(other, out, resume=True)


@pytest.mark.parametrize("same_place", [True, False])
def test_resuming_another_checkpoint_of_the_same_shapes(crashes, tmp_path, same_place):
    """Without OCDBT no metadata speak of the chunks, so all that is written about both is equal."""
    storage = {"ocdbt": False, "zarr3": False}
    one = synthetic.write(tmp_path / "one", "envy", **storage)
    other = synthetic.write(tmp_path / "other", "envy", seed=1, **storage)
    one.config_file()
    out = tmp_path / "out"
    crashes.leave_unfinished(one, out)
    if same_place:
        shutil.rmtree(one.run)
        other.run.rename(one.run)
        other = one
    other.config_file()
    with pytest.raises(OutputError, match="of another checkpoint"):
        to(other, out, resume=True)


def test_resuming_a_checkpoint_without_ocdbt(crashes, tmp_path):
    checkpoint = synthetic.write(tmp_path / "run", "envy", ocdbt=False, zarr3=False)
    checkpoint.config_file()
    out = tmp_path / "out"
    crashes.leave_unfinished(checkpoint, out)
    to(checkpoint, out, resume=True)
    to(checkpoint, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_chunks_of_zeros_are_told_when_resumed(crashes, tmp_path):
    """Of an older Orbax, which stores none, so that a lost one reads the same."""

    def change(arrays):
        arrays["token_embedder.embedding"][:] = 0

    checkpoint = synthetic.write(tmp_path / "run", "envy", change=change, zeros=False)
    checkpoint.config_file()
    out = tmp_path / "out"
    crashes.leave_unfinished(checkpoint, out)
    manifest = to(checkpoint, out, resume=True)
    assert any("token_embedder.embedding" in text for text in manifest.warnings)


def test_beginning_anew_over_an_unfinished_conversion(tiny, crashes, tmp_path):
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    (partial(out) / "stray").write_text("of an earlier version")
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml")
    assert ran.code == 0
    assert "an unfinished conversion to this OUT was found and begun anew" in ran.err
    assert contents(out) == contents(tmp_path / "whole")


def test_nothing_to_resume(tiny, tmp_path):
    ran = moeconv(
        "convert", tiny.run, tmp_path / "out", "--config", tiny.run / "config.yml", "--resume"
    )
    assert ran.code == 0
    assert "there is no unfinished conversion to resume; starting from the first byte" in ran.err


def test_files_of_an_interrupted_process_are_not_published(tiny, crashes, tmp_path):
    """Killed among the small files with one tokenizer, resumed without: none of it stays."""
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    (partial(out) / "tokenizer.json").write_text("{}")
    to(tiny, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


# --- OUT ----------------------------------------------------------------------------------------


def test_two_processes_to_one_out(big, expected, tmp_path):
    out = tmp_path / "out"
    config = ("--config", big.run / "config.yml")
    process = cli_runner.spawn("convert", big.run, out, *config, "--jobs", 1, "--quiet")
    while not MOMENTS["begun"](out):
        assert process.poll() is None
        time.sleep(0.0003)
    process.send_signal(signal.SIGSTOP)
    for flags in ((), ("--resume",), ("--overwrite",)):
        ran = moeconv("convert", big.run, out, *config, *flags)
        assert ran.code == OutputError.exit_code
        assert f"another process is converting to {out}" in ran.error
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    process.communicate()
    assert contents(out) == expected
    assert beside(out) == []


def test_many_processes_race_for_one_out(tiny, tmp_path):
    """Whoever comes, OUT is one whole model, and everybody else is told so."""
    out = tmp_path / "out"
    codes = []

    def race():
        for _ in range(8):
            try:
                to(tiny, out, jobs=1)
                codes.append(0)
            except OutputError as error:
                assert "another process" in str(error) or "is not empty" in str(error)
                codes.append(7)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(0) == 1
    assert len(codes) == 32
    to(tiny, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert beside(out) == []


def test_a_lock_that_was_removed_between_two_calls(tmp_path, monkeypatch):
    """The next process does not hold a lock file that is not there any more."""
    path = tmp_path / "lock"
    first, second = staging._Lock(path), staging._Lock(path)
    first.take()
    flock, calls = fcntl.flock, []

    def late(fd, how):
        calls.append(fd)
        if len(calls) == 1:
            first.release()
        return flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second.take()
    assert len(calls) == 2
    assert path.exists()
    second.release()
    assert not path.exists()


def test_a_non_empty_out_is_refused(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} is not empty and holds no model" in ran.error
    (out / "config.json").write_text("{}")
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} is not empty; pass --overwrite" in ran.error
    assert contents(out) == {"mine.txt": b"mine", "config.json": b"{}"}
    assert beside(out) == []


def test_a_card_alone_may_be_replaced_and_is_told_of(tiny, tmp_path):
    """Put there before the model, as for train/kaggle/export_to_hub.sh, which brings it back."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    config = ("--config", tiny.run / "config.yml")
    ran = moeconv("convert", tiny.run, out, *config)
    assert ran.code == OutputError.exit_code and "pass --overwrite" in ran.error
    ran = moeconv("convert", tiny.run, out, *config, "--overwrite")
    assert ran.code == 0, ran.err
    assert "removes from OUT what moeconv did not write: README.md" in ran.err
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("sidecar", [False, True])
def test_what_is_no_model_is_never_replaced(tiny, tmp_path, sidecar):
    out = tmp_path / "out"
    (out / "src").mkdir(parents=True)
    (out / "src" / "mine.py").write_text("mine")
    if sidecar:  # another training run
        (out / "moeconv.json").write_text('{"format": "moeconv-run", "version": 1, "config": {}}')
    before = contents(out)
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", "--overwrite")
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} is not empty and holds no model" in ran.error
    assert contents(out) == before
    assert beside(out) == []


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_overwriting_names_what_people_put_there(tiny, tmp_path, quiet):
    out = tmp_path / "out"
    convert_again = ("convert", tiny.run, out, "--config", tiny.run / "config.yml", "--overwrite")
    assert moeconv(*convert_again).code == 0
    (out / "verify.json").write_text("{}")
    assert "warning: --overwrite" not in moeconv(*convert_again).err
    for name in ("README.md", "LICENSE", "a.txt", "b.txt"):
        (out / name).write_text("mine")
    ran = moeconv(*convert_again, *quiet)
    assert ran.code == 0
    assert (
        "warning: --overwrite also removes from OUT what moeconv did not write: "
        "LICENSE, README.md, a.txt and 1 more\n" in ran.err
    )
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("where", [".", "..", "/", "~", "link", "$home/.."])
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--overwrite", "--dry-run")])
def test_an_out_that_people_live_in(tiny, tmp_path, monkeypatch, where, flags):
    home, here = tmp_path / "people" / "home", tmp_path / "a" / "b"
    for folder in (home, here):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("mine")
    (here / "link").symlink_to(here.parent)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    before = contents(tmp_path)
    out = where.replace("$home", str(home))
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", *flags)
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} " in ran.error
    assert "directory, which is never replaced; name a new directory" in ran.error
    assert contents(tmp_path) == before


def test_an_empty_out_is_used(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    to(tiny, out)
    assert (out / "moeconv.json").exists()
    assert beside(out) == []


def test_an_out_that_somebody_fills_meanwhile(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run = Engine.run

    def slow(self):
        result = run(self)
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        return result

    monkeypatch.setattr(Engine, "run", slow)
    with pytest.raises(OutputError, match="was filled by somebody else during the conversion"):
        to(tiny, out)
    monkeypatch.undo()
    assert contents(out) == {"mine.txt": b"mine"}
    with pytest.raises(OutputError, match="holds no model"):
        to(tiny, out, resume=True, overwrite=True)
    (out / "mine.txt").unlink()
    to(tiny, out, resume=True)
    to(tiny, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert beside(out) == []


@pytest.mark.parametrize("where", ["run/checkpoints/0/hf", "run/checkpoints/0/items/a/b",
                                   "run/checkpoints/0", "run/checkpoints/0/items",
                                   "run/checkpoints/1"])  # fmt: skip
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_out_inside_the_checkpoint(tmp_path, where, flags):
    checkpoint = synthetic.write(tmp_path / "run")
    before = contents(tmp_path)
    config = config_beside(tmp_path)
    ran = moeconv("convert", checkpoint.run, tmp_path / where, "--config", config, *flags)
    assert ran.code == OutputError.exit_code
    assert "lies inside the checkpoint" in ran.error
    config.unlink()
    assert contents(tmp_path) == before


def config_beside(folder: Path) -> Path:
    path = folder / "config.yml"
    path.write_text("decoder_block: mixtral\nnum_experts_per_tok: 2\n")
    return path


@pytest.mark.parametrize("where", [".", "run", "run/checkpoints"])
def test_out_that_contains_the_checkpoint(tmp_path, where):
    checkpoint = synthetic.write(tmp_path / "above" / "run")
    before = contents(tmp_path)
    out = tmp_path / "above" / where
    ran = moeconv(
        "convert", checkpoint.run, out, "--config", config_beside(tmp_path), "--overwrite"
    )
    assert ran.code == OutputError.exit_code
    assert "contains the checkpoint" in ran.error
    (tmp_path / "config.yml").unlink()
    assert contents(tmp_path) == before


def test_out_beside_the_steps_of_the_run(tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny.run, run)
    for _ in range(2):  # the second one finds the manifest of the first
        ran = moeconv(
            "convert", run, run / "hf", "--config", tiny.run / "config.yml", "--overwrite"
        )
        assert ran.code == 0, ran.err


def test_out_is_a_file(tiny, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    for flags in ((), ("--overwrite",), ("--resume",)):
        ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", *flags)
        assert ran.code == OutputError.exit_code
        assert f"OUT {out} is a file; give a directory" in ran.error
    assert contents(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("where", ["file/out", "/proc/moeconv/out", "x" * 250, "a/" + "x" * 300])
def test_out_that_cannot_be_made(tiny, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    ran = moeconv("convert", tiny.run, tmp_path / where, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "cannot write beside OUT" in ran.error
    assert contents(tmp_path) == {"file": b"mine"}
    assert os.listdir(tmp_path) == ["file"]


def test_a_home_that_nobody_has(tiny, tmp_path):
    ran = moeconv("convert", tiny.run, "~no-such-user/out", "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "~no-such-user" in ran.error


def test_an_out_that_is_a_symbolic_link(tiny, tmp_path):
    """The link stays, what it points to is replaced."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    (tmp_path / "nowhere").symlink_to("new")
    to(tiny, tmp_path / "out", overwrite=True)
    to(tiny, tmp_path / "nowhere")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "new")
    assert "moeconv.json" in contents(tmp_path / "new")


def test_folders_above_out_go_again(tmp_path):
    """Nothing is left of a conversion that fails, not even the way to it."""

    def spoil(arrays):
        arrays["decoder.layers.MoeBlock_0.wo"][1, 2, 3, 4] = np.nan

    checkpoint = synthetic.write(tmp_path / "run", change=spoil)
    config = checkpoint.config_file()
    ran = moeconv("convert", checkpoint.run, tmp_path / "a/b/out", "--config", config)
    assert ran.code == 6
    assert not (tmp_path / "a").exists()


# --- space --------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of some size."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "moeconv-test", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_no_space_is_seen_before_starting(big, disk):
    folder = disk(100 * MIB)
    ran = moeconv("convert", big.run, folder / "out", "--config", big.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "the conversion needs 145 MB" in ran.error
    assert "105 MB are free; free some space" in ran.error
    assert os.listdir(folder) == []


def test_space_that_others_took(big, disk, monkeypatch):
    """The check passes, then the files cannot be reserved."""
    folder = disk(100 * MIB)
    plenty = shutil.disk_usage(folder)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    ran = moeconv("convert", big.run, folder / "out", "--config", big.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "cannot reserve 111 MB" in ran.error
    assert "No space left on device" in ran.error
    assert os.listdir(folder) == []


def test_no_space_for_the_last_files(big, expected, disk, monkeypatch, tmp_path):
    """The weights fit, config.json does not: kept, and done once there is room."""
    size = len(expected["model.safetensors"])
    folder = disk((size // 4096 + 5) * 4096)
    out = folder / "out"
    plenty = shutil.disk_usage(folder)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    args = ("convert", big.run, out, "--config", big.run / "config.yml")
    ran = moeconv(*args)
    assert ran.code == OutputError.exit_code
    assert "No space left on device" in ran.error
    assert "go on with --resume" in ran.error
    assert not out.exists()
    done = journaled(out)
    subprocess.run(["mount", "-o", f"remount,size={size + 8 * MIB}", folder], check=True)
    ran = moeconv(*args, "--resume")
    assert ran.code == 0, ran.err
    assert f"resuming: {done} of 82" in ran.err
    assert contents(out) == expected


def test_too_little_space_loses_no_work(big, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(big, out, "middle", signal.SIGKILL)
    done = journaled(out)
    little = shutil.disk_usage(tmp_path)._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: little)
        with pytest.raises(OutputError, match="free some space"):
            to(big, out, resume=True)
    assert journaled(out) == done > 0
    to(big, out, resume=True)
    assert contents(out) == expected


def test_a_file_size_limit(big, tmp_path):
    """As `ulimit -f` sets it."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000)); "
        "from moeconv.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", big.run, tmp_path / "out"]
    command += ["--config", big.run / "config.yml"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=cli_runner.environment(), check=False
    )
    assert ran.returncode == OutputError.exit_code
    assert "cannot reserve 111 MB" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert os.listdir(tmp_path) == []


def test_out_is_a_mount_point(tiny, disk):
    folder = disk(100 * MIB)
    ran = moeconv("convert", tiny.run, folder, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "is a mount point" in ran.error
    assert beside(folder) == []


# --- the same bytes, each chunk once, within memory ---------------------------------------------


def test_jobs_and_memory_do_not_show(big, expected, tmp_path):
    prepared = plan_conversion(str(big.run), options(big))
    floor = prepared.plan.memory_floor
    for n, more in enumerate(({"jobs": 1}, {"jobs": 4}, {"jobs": 4, "max_memory": floor},
                              {"jobs": 1, "max_memory": 2 * floor})):  # fmt: skip
        to(big, tmp_path / f"out{n}", **more)
        assert contents(tmp_path / f"out{n}") == expected, more


@pytest.mark.parametrize("target", ["mixtral", "ernie4_5_moe"])
def test_sharded_arrays_give_the_same_tensors(tmp_path, small_units, target):
    """However the devices cut the arrays; the pieces of most cuts have to be parked."""
    results, parked = [], []
    for n, split in enumerate(({}, {"D": 4}, {"M": 3, "F": 2, "h": 2}, {"E": 2, "D": 3, "V": 5},
                               {"L": 2, "H": 2, "K": 2})):  # fmt: skip
        checkpoint = synthetic.write(tmp_path / f"run{n}", "envy", split=split)
        checkpoint.config_file()
        for jobs in (1, 3):
            prepared = plan_conversion(
                str(checkpoint.run), options(checkpoint, target=target, jobs=jobs)
            )
            convert(prepared, tmp_path / f"out{n}-{jobs}")
            results.append(tensors(tmp_path / f"out{n}-{jobs}"))
        parked.append(len(prepared.plan.parked))
    assert all(result == results[0] for result in results)
    assert parked[0] == 0
    assert max(parked) >= 3


@pytest.mark.parametrize("kind", ["whole", "parked"])
@pytest.mark.parametrize("storage", [{}, {"zarr3": False, "ocdbt": False}])
def test_every_chunk_is_read_once(tmp_path, monkeypatch, kind, storage):
    """Counted in the bytes that tensorstore fetches."""
    monkeypatch.setattr("moeconv.convert.plan.UNIT_BYTES", 1)
    monkeypatch.setattr(digest, "BLOCK_BYTES", MIB)
    monkeypatch.setattr(work, "BLOCK_BYTES", MIB)
    sizes = {"L": 2, "V": 8192, "D": 512, "M": 512, "F": 512, "h": 64}
    split = {"D": 2} if kind == "parked" else {}
    checkpoint = synthetic.write(tmp_path / "run", sizes=sizes, split=split, **storage)
    checkpoint.config_file()
    prepared = plan_conversion(str(checkpoint.run), options(checkpoint))
    assert bool(prepared.plan.parked) == (kind == "parked")
    files = [p for p in checkpoint.items.rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    stored = sum(p.stat().st_size for p in files)
    before = fetched()
    convert(prepared, tmp_path / "out")
    size, asked_again = (now - then for now, then in zip(fetched(), before, strict=True))
    # Metadata and indexes are a few kB an array; the smallest chunk counted here is 20 times that.
    assert stored <= size < stored + 200_000
    assert stored > 30_000_000
    assert asked_again == 0


def fetched() -> tuple[int, int]:
    """Bytes that were read, and questions whether a cached chunk is still the stored one."""
    metrics = ts.experimental_collect_matching_metrics
    read = [
        *metrics("/tensorstore/kvstore/file/bytes_read"),
        *metrics("/tensorstore/file/mmap_bytes"),
    ]
    [reads] = ts.experimental_collect_matching_metrics("/tensorstore/cache/kvs_cache_read")
    unchanged = [v["value"] for v in reads["values"] if v["category"] == "unchanged"]
    return sum(v["value"] for m in read for v in m["values"]), sum(unchanged)


MEASURED = """
import sys
from moeconv.cli.main import main
try:
    main()
finally:
    lines = open("/proc/self/status").read().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""


@pytest.mark.parametrize("split", [{"V": 16}, {"D": 16}], ids=["rows", "columns (parked)"])
def test_peak_memory_stays_within_the_limit(tmp_path, split):
    """A 268 MB array in 16 chunks, with a limit at the floor and with two workers."""
    sizes = {"L": 2, "V": 131_072, "D": 512}
    checkpoint = synthetic.write(tmp_path / "run", sizes=sizes, split=split)
    config = checkpoint.config_file()
    plan = plan_conversion(str(checkpoint.run), options(checkpoint)).plan
    assert max(u.nbytes for u in plan.units) == 2**26
    assert bool(plan.parked) == ("D" in split)
    limit = -(-plan.memory_floor // MIB)
    assert limit < 300
    args = ["convert", checkpoint.run, tmp_path / "out", "--config", config, "--jobs", 2]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, args), "--max-memory", f"{limit}MiB"],
        capture_output=True, text=True, env=cli_runner.environment(), check=True,
    )  # fmt: skip
    peak = int(ran.stderr.split("VmHWM:")[1].split()[0]) * 1024
    assert peak <= limit * MIB
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        written = file.get_tensor("model.embed_tokens.weight")
    assert np.array_equal(written, checkpoint.arrays["token_embedder.embedding"])


def test_memory_below_the_floor(big, tmp_path):
    floor = plan_conversion(str(big.run), options(big)).plan.memory_floor
    out, config = tmp_path / "out", ("--config", big.run / "config.yml")
    ran = moeconv("convert", big.run, out, *config, "--max-memory", floor - MIB)
    assert ran.code == MemoryLimitError.exit_code == 9
    number = -(-floor // MIB)
    assert f"give --max-memory {number}MiB or more" in ran.error
    assert os.listdir(tmp_path) == []
    assert moeconv("convert", big.run, out, *config, "--max-memory", f"{number}MiB").code == 0


# --- what is written ----------------------------------------------------------------------------


def test_shards_index_and_files_agree(tiny, tmp_path):
    to(tiny, tmp_path / "one")
    manifest = to(tiny, tmp_path / "many", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    found, size = {}, 0
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 4
    for path in shards:
        assert path.name in manifest.files
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            names = file.keys()
            for name in names:
                found[name] = path.name
                size += file.get_tensor(name).nbytes
    assert found == index["weight_map"]
    assert size == index["metadata"]["total_size"]
    assert tensors(tmp_path / "many") == tensors(tmp_path / "one")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_the_manifest_has_every_file(tiny, tmp_path):
    import hashlib

    manifest = to(tiny, tmp_path / "out", max_shard_bytes=20_000)
    written = contents(tmp_path / "out")
    del written["moeconv.json"]
    assert {n: (r.size, r.sha256) for n, r in manifest.files.items()} == {
        name: (len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in written.items()
    }


def test_memory_order_is_not_written_as_if_it_were_logical_order():
    """safetensors#825: its own writer does that to a transposed numpy array."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bytes(payload(array)) == array.tobytes()
    for other in (array.T, array[:, ::2], array[::-1], np.asfortranarray(array)):
        with pytest.raises(ValueError, match="C-contiguous"):
            payload(other)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("target", ["mixtral", "ernie4_5_moe"])
def test_maxtexts_checkpoint_becomes_what_the_ops_say(maxtext_lab, tmp_path, target, dtype):
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    config = tmp_path / "config.yml"
    config.write_text("decoder_block: envy\nnum_experts_per_tok: 2\n")
    prepared = plan_conversion(
        str(lab.run_dir), ConvertOptions(config=config, target=target, dtype=dtype)
    )
    convert(prepared, tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert written.keys() == prepared.plan.edges.keys()
    for name, edge in prepared.plan.edges.items():
        source = lab.params[edge.source.name] if edge.source else np.empty((), DTYPES[edge.dtype])
        assert written[name] == edge.apply(source).tobytes(), name


def test_strips_of_any_width_transpose_alike(tiny, tmp_path, monkeypatch):
    to(tiny, tmp_path / "out")
    monkeypatch.setattr(scatter, "_STRIP", 5)
    to(tiny, tmp_path / "strips")
    assert contents(tmp_path / "strips") == contents(tmp_path / "out")
