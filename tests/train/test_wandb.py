"""Weights & Biases: online, offline, absent, broken; nothing of it ends the run."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from moeconv_train.logs import wandb
from train_lab import Wandb
from wandb_server import Server

KEY = "k" * 40
CONFIG = SimpleNamespace(
    wandb_project_name="p",
    wandb_run_name="n",
    get_keys=lambda: {"steps": 3, "hf_access_token": "secret"},
)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("API_KEY", "MODE", "RUN_ID", "ENTITY", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def session(run, steps, entity=None):
    """What a run logs, through MaxText's own calls; what is told."""
    module, notes = sys.modules["wandb"], []
    with wandb.logged(run, CONFIG, entity, notes.append):
        module.init(project="p", name="n", resume="allow")  # MetricLogger.__init__
        for step in steps:
            module.log({"learning/loss": float(step)}, step=step)
    return notes


def test_the_id_is_the_same_for_as_long_as_the_directory_lives(tmp_path, monkeypatch):
    first = wandb.run_id(tmp_path)
    assert first == wandb.run_id(tmp_path) and len(first) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert wandb.run_id(tmp_path) == first
    (tmp_path / "new").mkdir()
    assert wandb.run_id(tmp_path / "new") == "another"


def test_a_run_is_begun_with_all_that_maxtext_cannot_say(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    session(tmp_path, [], entity="some-org")
    given = module.calls[0]
    assert (given["entity"], given["project"], given["name"]) == ("some-org", "p", "n")
    assert (given["id"], given["resume"]) == (wandb.run_id(tmp_path), "allow")
    assert given["dir"] == str(tmp_path) and given["config"] == {"steps": 3}
    monkeypatch.setenv("WANDB_ENTITY", "mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    session(tmp_path, [], entity="some-org")
    assert module.calls[2]["entity"] == "mine" and module.modes == ["online", "offline"]


ONLINE, OFFLINE, NONE = ["online"], ["online", "offline"], ["online", "offline", "disabled"]


@pytest.mark.parametrize(
    ("module", "modes", "logged", "told"),
    [
        (Wandb(), ONLINE, [1, 2], []),
        (Wandb([OSError("no net.")]), OFFLINE, [1, 2], ["W&B: no net; logging offline"]),
        (
            Wandb([OSError("a"), OSError("b")]),
            NONE,
            [1, 2],
            ["W&B: a; logging offline", "W&B: b; not used"],
        ),
        (
            Wandb(log=OSError("full")),
            ONLINE,
            [],
            ["W&B: full; logging there ends, the run goes on"],
        ),
        (
            Wandb(finish=TimeoutError("slow")),
            ONLINE,
            [1, 2],
            ["W&B: slow; `wandb sync RUN/wandb` uploads what is left"],
        ),
    ],
)
def test_nothing_of_wandb_ends_the_run(monkeypatch, tmp_path, module, modes, logged, told):
    monkeypatch.setitem(sys.modules, "wandb", module)
    stock = module.log
    notes = session(tmp_path, [1, 2])
    assert [note.replace(str(tmp_path), "RUN") for note in notes] == told
    assert module.modes == modes and [step for step, _ in module.logged] == logged
    assert module.log == stock and module.finished == 1


def test_wandb_itself_without_anything(tmp_path, monkeypatch):
    """A folder that cannot be written: neither online nor offline, and still a run."""
    module = pytest.importorskip("wandb")
    monkeypatch.setattr(module, "init", failing_but_disabled(module.init))
    notes = session(tmp_path, range(2))
    assert [note.partition("; ")[2] for note in notes] == ["logging offline", "not used"]
    assert not (tmp_path / "wandb").exists()


def failing_but_disabled(init):
    def failing(**kwargs):
        if "id" in kwargs:
            raise OSError("no")
        return init(**kwargs)

    return failing


def test_offline_sessions_of_a_run_are_synced_into_one(tmp_path, monkeypatch):
    """docs/train.md: the command, and W&B's order."""
    pytest.importorskip("wandb")
    assert wandb.missing() is None
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for start in (0, 2, 4):
        (note,) = session(tmp_path, range(start, start + 2))
        assert note.startswith("W&B: No API key configured") and note.endswith("logging offline")
        time.sleep(1.1 - time.time() % 1)  # folders are named by the second
    identity = wandb.run_id(tmp_path)
    made = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(made) == 3 and {name.rpartition("-")[2] for name in made} == {identity}
    assert os.listdir(here) == []  # of the init that found no key, neither
    with Server() as server:
        keys = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address}
        command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")]
        done = subprocess.run(command, env=os.environ | keys, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        server.shutdown()
    assert list(server.runs) == [identity]
    assert [line["learning/loss"] for line in server.runs[identity]] == list(range(6))


def test_a_wandb_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb is not installed" in wandb.missing()
