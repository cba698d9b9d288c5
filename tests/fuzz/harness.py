"""The fuzz tests' world: files that are changed and put back, a command, and what must hold then.

Whatever a file holds, a command ends with a documented exit code and a sentence, in time, within
memory; it writes nothing but OUT, tells no secret, and what it calls done is right.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from cli_runner import ROOT
from hub_answers import Answer, Answers
from hub_server import WRITE, Hub
from hub_store import Store
from mutations import Change, Edit, Format, Kind, Spoil, apply, place
from tree import Tree, scan
from worker import Ended
from worker_process import Process

from moeconv.untrusted import strict_json
from moeconv.untrusted.text import printable

SCALE = int(os.environ.get("MOECONV_FUZZ", "1"))
CPU, MEMORY, WAIT = 10.0, 600 << 20, 900.0

_TABLE = re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
# Nobody interrupts or trains here, and 1 is a bug but for verify.
DOCUMENTED = {int(code) for code in _TABLE} - {1, 14, 15, 130}
VERDICTS = {0, 1, 2}
_VERIFY_WRITES = re.compile(r"out/verify[\w.]*")
_STAGING = re.compile(r"(half/)?\.out\.moeconv-(partial|lock)(/.*)?")

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

_EXTRAS = ("torch", "transformers", "tokenizers", "jax", "flax", "maxtext", "matplotlib")


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
        names = json.loads(self.first["out/moeconv_manifest.json"][1])["files"]
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
        manifest = json.loads((out / "moeconv_manifest.json").read_bytes())
        for name, record in manifest["files"].items():
            raw = (out / name).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == record["sha256"], name
            if name.endswith(".safetensors"):
                (size,) = struct.unpack("<Q", raw[:8])
                header = strict_json.loads(raw[8 : 8 + size])
                ends = [one["data_offsets"][1] for key, one in header.items() if key[:2] != "__"]
                assert max(ends) == len(raw) - 8 - size, name
        names = {path.name for path in out.iterdir()}
        assert names == {*manifest["files"], "moeconv_manifest.json"}, names
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
        landed = "moeconv_manifest.json" in files
        if command == "push plan":
            assert repo is None, "a dry run changed the Hub"
        elif ended.code == 0:
            assert landed, "push said 0, and nothing is on the Hub"
            listed = json.loads(store.read(files["moeconv_manifest.json"]))["files"]
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
