"""The fuzz tests' world: files that are changed and put back, a command, and what must hold then.

Whatever a file holds, a command ends with a documented exit code and a sentence, in time, within
memory; it writes nothing but OUT, tells no secret, and what it calls done is right.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from cli_runner import ROOT
from hub_server import WRITE, Hub
from hub_store import Store
from mutations import JSON, Change, Edit, Format, Kind, Spoil, apply, place
from worker import Ended

from moeconv.untrusted import strict_json
from moeconv.untrusted.text import printable

SCALE = int(os.environ.get("MOECONV_FUZZ", "1"))
WALL, CPU, MEMORY, WAIT = 60.0, 10.0, 600 << 20, 900.0

_TABLE = re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
# Nobody interrupts or trains here, and 1 is a bug but for verify.
DOCUMENTED = {int(code) for code in _TABLE} - {1, 14, 15, 130}
VERDICTS = {0, 1, 2}
_VERIFY_WRITES = re.compile(r"out/verify[\w.]*")
_STAGING = re.compile(r"(half/)?\.out\.moeconv-(partial|lock)(/.*)?")
# Larger ones are told from others by their size.
_READ = 8 << 20

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\nZnV6ei1zZWNyZXQtb2YtYS1uZWlnaGJvdXI\n"
MARKS = ("ZnV6ei1zZWNyZXQtb2YtYS1uZWlnaGJvdXI", WRITE)

COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "run"),
    "inspect json": ("inspect", "run", "--json"),
    "plan": ("convert", "run", "new", "--dry-run"),
    "convert": ("convert", "run", "new", "--jobs", "2", "--max-memory", "512MiB"),
    "overwrite": ("convert", "run", "out", "--overwrite", "--quiet"),
    "resume": ("convert", "run", "half/out", "--resume"),
    "inspect folders": ("inspect", "folders", "--config", "folders/config.yml"),
    "convert folders": ("convert", "folders", "new", "--config", "folders/config.yml"),
    "inspect older": ("inspect", "older", "--config", "older/config.yml"),
    "convert older": ("convert", "older", "new", "--config", "older/config.yml"),
    "ranks": ("convert", "folders", "new", "--config", "folders/config.yml",
              "--set", "vocab_size=64", "--tokenizer", "ranks.tiktoken"),
    "structure": ("verify", "out", "--level", "structure"),
    "weights": ("verify", "out", "--level", "weights"),
    "push plan": ("push", "out", "--dry-run"),
    "push": ("push", "out", "--quiet"),
    "push anyway": ("push", "out", "--unverified", "--quiet"),
}  # fmt: skip

_WORKER = Path(__file__).with_name("worker.py")
_EXTRAS = ("torch", "transformers", "tokenizers", "jax", "flax", "maxtext", "matplotlib")

# What lies at a path; a file has its content, or its size where it is large.
Entry = tuple[str, Any]
Tree = dict[str, Entry]


class Process:
    """A `worker.py`, started when it is needed, and anew when it died."""

    def __init__(self, hidden: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._hidden, self._environment, self._log = hidden, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, *args: object, wall: float = WALL) -> Any:
        """The worker's answer.

        Raises:
            AssertionError: It died, or took too long.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        self._connection.send((name, args))
        try:
            if self._connection.poll(wall):
                return self._connection.recv()
            why = f"no end after {wall:.0f} s"
        except (EOFError, ConnectionError):
            why = f"died with {self._process.wait()}"
        said = self.said()
        self.stop()
        raise AssertionError(f"{why}: {said[max(0, said.rfind('Timeout (')) :][:4000]}")

    def _start(self) -> None:
        here, there = Pipe()
        self._connection = here
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, _WORKER, str(there.fileno()), str(WALL), *self._hidden],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                pass_fds=[there.fileno()],
            )
        there.close()

    def said(self) -> str:
        """What came past Python's streams."""
        return self._log.read_text(errors="replace") if self._process else ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class Answer:
    """How an answer of the Hub is changed.

    Attributes:
        route: Of which question; see `hub_server.ROUTES`.
        changes: Of its JSON.
        status: Instead of its own.
        headers: Besides its own.
        skip: Answers that go well before.
    """

    route: str
    changes: tuple[Edit | Spoil, ...] = ()
    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    skip: int = 0


class Answers:
    """What stands between the Hub and its answers: keeps them, or changes some.

    Attributes:
        record: The last answer by route.
        change: What is changed.
        said: How often a route answered.
    """

    def __init__(self) -> None:
        self.record: dict[str, bytes] = {}
        self.change: Answer | None = None
        self.said: Counter[str] = Counter()

    def handler(self, hub: Hub) -> type[Any]:
        """The Hub's handler of requests, with this in it."""
        answers = self

        class Handler(hub.server.RequestHandlerClass):  # type: ignore[misc]
            def _answer(self, status: int, content: Any, headers: Any = None) -> None:
                route = getattr(getattr(self, "record", None), "route", "")
                super()._answer(*answers.pass_on(route, status, content, headers or {}))

        return Handler

    def pass_on(
        self, route: str, status: int, content: Any, headers: dict[str, str]
    ) -> tuple[int, Any, dict[str, str]]:
        """The answer as it is sent."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.record[route] = raw
        change = self.change
        self.said[route] += 1
        if change is None or change.route != route or self.said[route] <= change.skip:
            return status, content, headers
        if not isinstance(content, bytes):
            headers = {"Content-Type": "application/json", **headers}
            raw = apply(raw, change.changes, JSON)
        return change.status or status, raw, {**headers, **dict(change.headers)}


class World:
    """Files to change, the processes that run commands on them, and a Hub.

    Attributes:
        folder: What commands are run in; it is as it was after every example.
        first: What lies in it.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.folder = base / "world"
        self.secret = base / "secret" / "id_rsa"
        self.secret.parent.mkdir()
        self.secret.write_text(SECRET)
        self.hub = Hub(base / "hub")
        self.answers = Answers()
        self.hub.server.RequestHandlerClass = self.answers.handler(self.hub)
        self.hub.__enter__()
        paths = [ROOT, *(ROOT / "tests" / name for name in ("", "hub", "fuzz"))]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(base / "home"),
            "HF_TOKEN": WRITE,
            "OMP_NUM_THREADS": "1",
        }
        self._bare = Process(_EXTRAS, environment, base / "bare.log")
        self._full = Process(("maxtext",), environment, base / "full.log")
        self.folder.mkdir()
        builder = Process(("torch", "transformers"), environment, base / "build.log")
        builder.call("build", self.folder)
        builder.stop()
        self.outside = scan(self.secret.parent)
        self.first = scan(self.folder)
        # --resume goes by a source's times.
        self._times = {n: os.stat(self.folder / n).st_mtime_ns for n in self.first}

    def close(self) -> None:
        self._bare.stop()
        self._full.stop()
        self.hub.__exit__()

    def find(self, pattern: str) -> str:
        """The first file of such a name."""
        return str(min(self.folder.glob(pattern)).relative_to(self.folder))

    def recorded(self) -> dict[str, bytes]:
        """What the Hub says at a push that goes well, by route."""
        self.answers.record, self.answers.change = {}, None
        ended = self.run("push")
        self.restore()
        assert ended.code == 0, ended.err
        return self.answers.record

    # --- one example ----------------------------------------------------------------------------

    def holds(
        self,
        command: str,
        name: str,
        changes: Sequence[Change] = (),
        form: Format | None = None,
        *,
        more: Sequence[str] = (),
        full: bool = False,
    ) -> Ended:
        """Changes a file, runs a command, and says what does not hold.

        Args:
            command: Name in `COMMANDS`.
            name: The file.
            changes: What is changed.
            form: Of the file.
            more: Arguments.
            full: With transformers and all other packages, instead of a bare install.
        """
        try:
            self.change(name, changes, form)
            return self.run(command, more=more, full=full)
        except AssertionError as wrong:
            raise AssertionError(f"{wrong}\n{self._recipe(command, more, name)}") from None
        finally:
            self.restore()

    def answers_hold(self, command: str, answer: Answer) -> Ended:
        """Changes an answer of the Hub, runs a command, and says what does not hold."""
        self.answers.change = answer
        self.answers.said.clear()
        try:
            return self.run(command)
        except AssertionError as wrong:
            raise AssertionError(f"{wrong}\n{answer}") from None
        finally:
            self.answers.change = None
            self.restore()

    def run(self, command: str, *, more: Sequence[str] = (), full: bool = False) -> Ended:
        """Runs a command on the files as they are; see `holds`."""
        self._reset_hub()
        before = scan(self.folder)
        ended = self._call(command, more, full=full)
        self._judge(command, ended, before)
        if ended.code == 0:
            self._judge_done(command, before)
        return ended

    def change(self, name: str, changes: Sequence[Change], form: Format | None = None) -> None:
        """Changes a file."""
        path = self.folder / name
        if not changes:
            return
        kinds = [one for one in changes if isinstance(one, Kind)]
        if kinds:
            place(path, kinds[-1].kind, self.secret)
            return
        plain = [one for one in changes if isinstance(one, Edit | Spoil)]
        raw = path.read_bytes()
        path.unlink()  # another inode, so that `scan` sees it
        path.write_bytes(apply(raw, plain, form))
        os.utime(path, ns=(0, self._times[name]))

    def restore(self) -> None:
        """Puts back what is not as it was."""
        if scan(self.secret.parent) != self.outside:
            shutil.rmtree(self.secret.parent)
            self.secret.parent.mkdir()
            self.secret.write_text(SECRET)
        now = scan(self.folder)
        for name in sorted(now, reverse=True):
            if now[name] != self.first.get(name):
                path = self.folder / os.fsdecode(name)
                if now[name][0] == "folder":
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
        for name, (kind, content) in sorted(self.first.items()):
            path = self.folder / name
            if kind == "folder":
                path.mkdir(exist_ok=True)
            elif not path.exists():
                path.write_bytes(content)
                os.utime(path, ns=(0, self._times[name]))

    # --- the oracle -----------------------------------------------------------------------------

    def _call(self, command: str, more: Sequence[str] = (), *, full: bool = False) -> Ended:
        words = [
            str(self.folder / word) if self._is_place(word) else word for word in COMMANDS[command]
        ]
        process = self._full if full else self._bare
        if full:
            process.call("warm", wall=300)
        heard = len(process.said())
        ended: Ended = process.call("command", *words, *more)
        past = process.said()[heard:]
        assert "Traceback" not in past, past
        return Ended(ended.code, ended.out, ended.err + past, ended.cpu, ended.peak, ended.slept)

    def _is_place(self, word: str) -> bool:
        first = word.split("/")[0]
        return first in ("run", "new", "out", "half", "folders", "older", "ranks.tiktoken")

    def _judge(self, command: str, ended: Ended, before: Tree) -> None:
        verify = command in ("structure", "weights")
        said = ended.out + ended.err
        assert ended.code is not None and "Traceback" not in said, f"traceback: {ended.err[-3000:]}"
        assert "this is a bug" not in said, said[-3000:]
        assert ended.code in (VERDICTS if verify else DOCUMENTED), f"code {ended.code}: {said}"
        words = ended.err.count("error: ") + ended.err.count("Error: ")
        failed = ended.code == 2 if verify else ended.code != 0
        assert words >= failed, f"code {ended.code} without a sentence: {ended.err}"
        if "json" in command and ended.code == 0:
            strict_json.loads(ended.out)
        assert printable(said) == said, f"control characters: {said!r}"
        for mark in MARKS:
            assert mark not in said, f"a secret in the output: {said}"
        assert ended.cpu < CPU, f"{ended.cpu:.1f} s of the processor; {ended.err[-500:]}"
        assert ended.peak < MEMORY, f"{ended.peak >> 20} MiB; {ended.err[-500:]}"
        assert ended.slept <= WAIT, f"would have waited {ended.slept:.0f} s; {ended.err[-500:]}"
        self._judge_files(command, ended, before)
        if command.startswith("push"):
            self._judge_hub(command, ended)

    def _judge_files(self, command: str, ended: Ended, before: Tree) -> None:
        assert scan(self.secret.parent) == self.outside, "a file of somebody else was changed"
        after = scan(self.folder)
        new = {name: entry for name, entry in after.items() if before.get(name) != entry}
        gone = before.keys() - after.keys()
        made = self._made(command) if ended.code == 0 else None
        wrong = []
        for name in sorted(new.keys() | gone):
            mine = made is not None and (name == made or name.startswith(f"{made}/"))
            verdict = command in ("structure", "weights") and _VERIFY_WRITES.fullmatch(name)
            if not (mine or verdict or _STAGING.fullmatch(name)):
                wrong.append(name)
        assert not wrong, f"code {ended.code}, but changed: {wrong}"
        for name, (kind, content) in new.items():
            if kind == "file" and isinstance(content, bytes):
                for mark in MARKS:
                    assert mark.encode() not in content, f"{name} holds a secret"
                finished = not _STAGING.fullmatch(name)
                if name.endswith((".json", ".jsonl")) and finished:
                    strict_json.loads(content)
        if made is not None:
            self._judge_model(self.folder / made)

    def _judge_done(self, command: str, before: Tree) -> None:
        """What must not be passed or published."""
        if command not in ("structure", "push"):
            return
        names = json.loads(self.first["out/moeconv.json"][1])["files"]
        moved = [n for n in names if before.get(f"out/{n}") != self.first[f"out/{n}"]]
        assert not moved, f"{command} said 0, but this was changed: {moved}"
        if command == "push":
            report = json.loads(before["out/verify.json"][1])
            bad = [check["name"] for check in report["checks"] if check["status"] == "fail"]
            assert not bad and report["verdict"] != "fail", f"pushed, though these failed: {bad}"

    def _made(self, command: str) -> str | None:
        if COMMANDS[command][0] != "convert" or "--dry-run" in COMMANDS[command]:
            return None
        return COMMANDS[command][2]

    def _judge_model(self, out: Path) -> None:
        """What convert calls done is a model whose files are those of the manifest."""
        manifest = json.loads((out / "moeconv.json").read_bytes())
        for name, record in manifest["files"].items():
            raw = (out / name).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == record["sha256"], name
            if name.endswith(".safetensors"):
                (size,) = struct.unpack("<Q", raw[:8])
                header = strict_json.loads(raw[8 : 8 + size])
                ends = [one["data_offsets"][1] for key, one in header.items() if key[:2] != "__"]
                assert max(ends) == len(raw) - 8 - size, name
        names = {path.name for path in out.iterdir()}
        assert names == {*manifest["files"], "moeconv.json"}, names
        for level in ("structure", "weights"):
            args = ["verify", str(out), "--level", level, "--report", str(self.base)]
            ended: Ended = self._bare.call("command", *args)
            assert ended.code == 0, f"convert said 0, level {level}: {ended.out}{ended.err}"

    def _judge_hub(self, command: str, ended: Ended) -> None:
        store = self.hub.store
        for path in store.blobs.iterdir():
            for mark in MARKS:
                assert mark.encode() not in path.read_bytes(), "a secret is on the Hub"
        repo = store.repos.get("alice/model")
        files = repo.files() if repo is not None else {}
        landed = "moeconv.json" in files
        if command == "push plan":
            assert repo is None, "a dry run changed the Hub"
        elif ended.code == 0:
            assert landed, "push said 0, and nothing is on the Hub"
            listed = json.loads(store.read(files["moeconv.json"]))["files"]
            for name, record in listed.items():
                same = files[name].sha256 == record["sha256"]
                assert same or command == "push anyway", f"{name} is on the Hub, and damaged"
        else:
            told = "the commit" in ended.err
            assert not landed or told, f"code {ended.code}, but on the Hub: {ended.err}"

    # --- the rest -------------------------------------------------------------------------------

    def _reset_hub(self) -> None:
        if self.hub.seen or self.hub.store.repos:
            shutil.rmtree(self.base / "hub")
            self.hub.store = Store(self.base / "hub")
            self.hub.seen.clear()
            self.hub.faults.clear()

    def _recipe(self, command: str, more: Sequence[str], name: str) -> str:
        """What was run, and on what."""
        path = self.folder / name
        if path.is_symlink():
            held = f"a link to {os.readlink(path)}"
        elif path.is_file():
            with path.open("rb") as file:
                held = repr(file.read(1500).rstrip(b"\0"))
        else:
            held = "no file"
        return f"moeconv {' '.join([*COMMANDS[command], *more])}\n{name}: {held}"


@contextmanager
def world():
    """A `World`, in memory where the system has a folder for that."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="moeconv-fuzz-", dir=where) as folder:
        made = World(Path(folder))
        try:
            yield made
        finally:
            made.close()


# By path: what tells a file from a changed one, and what lies there. Reading is most of the work.
_known: dict[str, tuple[tuple[int, ...], Entry]] = {}


def scan(folder: Path) -> Tree:
    """Everything below a folder."""
    found: Tree = {}
    pending, cut = [str(folder)], len(str(folder)) + 1
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                found[entry.path[cut:]] = _entry(entry.path, status)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
    return found


def _entry(path: str, status: os.stat_result) -> Entry:
    if stat.S_ISDIR(status.st_mode):
        return "folder", None
    if stat.S_ISLNK(status.st_mode):
        return "link", os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return "special", stat.S_IFMT(status.st_mode)
    if status.st_size > _READ:
        return "file", status.st_size
    mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if path not in _known or _known[path][0] != mark:
        _known[path] = mark, ("file", Path(path).read_bytes())
    return _known[path][1]
