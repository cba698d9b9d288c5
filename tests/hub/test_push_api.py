"""`moeconv.push` does what the command does, and what it returns prints itself."""

import json

import pytest

import moeconv
from moeconv.errors import HubError, UnverifiedError, UsageError


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_a_dry_run_prints_as_the_command_does(hub, push, out):
    looked = moeconv.push(out, "alice/other", dry_run=True, private=True, note=lambda text: None)
    args = ("--dry-run", "--private", "--repo-id", "alice/other")
    assert str(looked).splitlines() == lines(push(*args).out)
    assert looked.as_dict() == looked.plan.as_dict() == json.loads(push(*args, "--json").out)
    assert looked.commit is None and looked.sent_bytes == 0
    assert hub.count("commit") == 0


def test_a_push_prints_as_the_command_does(hub, push, out):
    notes = []
    done = moeconv.push(str(out), note=notes.append)
    assert done.commit.oid == hub.repo().branches["main"]
    assert [note for note in notes if note.startswith("sending ")]
    again = moeconv.push(out, note=notes.append)
    assert again.commit.oid == done.commit.oid and again.sent_bytes == 0
    assert str(again).splitlines() == lines(push().out)
    assert again.as_dict() == json.loads(push("--json").out)


def test_what_may_not_go_raises(hub, out, monkeypatch):
    with pytest.raises(UsageError, match="NAMESPACE/NAME"):
        moeconv.push(out, "nowhere")
    (out / "verify.json").unlink()
    with pytest.raises(UnverifiedError, match="there is no verify"):
        moeconv.push(out)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="there is no token"):
        moeconv.push(out)
    assert hub.count("commit") == 0
