"""Weights & Biases: online, offline, absent, broken; nothing of it ends the run."""

import json
import os
import sys

import pytest
from moeconv_train.logs import wandb
from moeconv_train.settings import WandbSettings


@pytest.fixture
def no_key(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def test_the_id_is_the_same_for_as_long_as_the_directory_lives(tmp_path, no_key, monkeypatch):
    first = wandb.run_id(tmp_path)
    assert first == wandb.run_id(tmp_path) and len(first) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert wandb.run_id(tmp_path) == first
    (tmp_path / "new").mkdir()
    assert wandb.run_id(tmp_path / "new") == "another"


def test_without_a_key_it_is_offline(tmp_path, no_key, monkeypatch):
    settings = WandbSettings(enabled=True, entity="some-org")
    found = wandb.environment(tmp_path, settings)
    assert found["WANDB_MODE"] == "offline" and found["WANDB_ENTITY"] == "some-org"
    assert found["WANDB_DIR"] == str(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_ENTITY", "mine")
    found = wandb.environment(tmp_path, settings)
    assert "WANDB_MODE" not in found and "WANDB_ENTITY" not in found
    assert "k" * 40 not in json.dumps(found)


def test_a_login_of_wandb_is_a_key(tmp_path, no_key, monkeypatch):
    assert not wandb.has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb.has_key()


class Broken:
    """wandb's module, of which any part may fail."""

    def __init__(self, init=(), log=None):
        self.trouble, self.log_trouble = list(init), log
        self.calls, self.logged, self.finished = [], [], 0
        self.config = self

    def update(self, content, **_):
        self.content = content

    def init(self, **kwargs):
        self.calls.append(kwargs)
        if self.trouble and (error := self.trouble.pop(0)):
            raise error
        return self

    def log(self, content, step):
        if self.log_trouble:
            raise self.log_trouble
        self.logged.append(step)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize(
    ("module", "modes", "logged_", "told"),
    [
        (Broken(), [None], [1, 2], []),
        (Broken([OSError("no network")]), [None, "offline"], [1, 2], ["W&B: no network; logging"]),
        (Broken([OSError("a"), OSError("b")]), [None, "offline"], [], ["W&B: a;", "W&B: b; not"]),
        (Broken(log=OSError("full")), [None], [], ["W&B: full; logging there ends"]),
    ],
)
def test_nothing_of_wandb_ends_the_run(monkeypatch, module, modes, logged_, told):
    monkeypatch.setitem(sys.modules, "wandb", module)
    stock, notes = (module.init, module.log), []
    with wandb.guarded(lambda: {"steps": 3}, notes.append):
        module.init(project="p", resume="allow")
        module.log({}, step=1)
        module.log({}, step=2)
    assert [call.get("mode") for call in module.calls] == modes
    assert module.logged == logged_ and (module.init, module.log) == stock
    assert len(notes) == len(told)
    assert all(note.startswith(text) for note, text in zip(notes, told, strict=True))
    if logged_:
        assert module.finished == 1 and module.content == {"steps": 3}


def test_wandb_itself_offline(tmp_path, no_key, monkeypatch):
    module = pytest.importorskip("wandb")
    assert wandb.missing() is None
    for key, value in wandb.environment(tmp_path, WandbSettings(enabled=True)).items():
        monkeypatch.setenv(key, value)
    notes = []
    with wandb.guarded(lambda: {"steps": 2}, notes.append):
        module.init(project="p", name="n", resume="allow")  # as MaxText does
        for step in range(2):
            module.log({"learning/loss": 1.0}, step=step)
    identity = (tmp_path / "wandb-run-id.txt").read_text().strip()
    made = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(made) == 1 and made[0].endswith(identity)
    assert notes == []


def test_a_wandb_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb is not installed" in wandb.missing()
