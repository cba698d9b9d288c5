"""Whatever goes wrong on the way: the repository is as before or wholly new, and one sentence says
what to do; what the Hub has by then is not sent again."""

import json
import signal
import subprocess
import threading
import time

import cli_runner
import hub_server
import pytest
from huggingface_hub.utils import close_session

from moeconv.errors import HubError

ALWAYS = 10**6


@pytest.fixture
def there(hub, push):
    """The repository exists already, with an older file of somebody."""
    repo = hub.store.create("alice/model", private=False)
    hub.store.write(repo, {"notes.txt": b"mine"})
    return repo


def names(out) -> set[str]:
    """Files that belong to the model."""
    return set(json.loads((out / "moeconv_manifest.json").read_text())["files"])


def assert_whole_or_unchanged(repo, out, before: str) -> bool:
    """Whether the new commit landed; there is nothing in between."""
    files = repo.files()
    if repo.branches["main"] == before:
        assert not names(out) & set(files)
        return False
    assert names(out) <= set(files)
    assert repo.resolve("main").parent == before
    return True


# What trying again mends -------------------------------------------------------------------------

MENDED = {
    "the connection breaks in the middle of a file": {"route": "put", "drop": "mid"},
    "the second part fails": {"route": "put", "status": 500, "part": 2},
    "a part breaks off": {"route": "put", "drop": "mid", "part": 3},
    "storage is slow down": {"route": "put", "status": 503, "times": 2},
    "whoami has too many": {"route": "whoami", "status": 429, "headers": {"Retry-After": "3"}},
    "listing in trouble": {"route": "tree", "status": 502, "times": 3},
    "info breaks off": {"route": "info", "drop": "after"},
    "preupload is limited": {"route": "preupload", "status": 429, "headers": {"Retry-After": "7"}},
    "batch in trouble": {"route": "lfs_batch", "status": 500},
    "completion in trouble": {"route": "complete", "status": 504},
    "validation in trouble": {"route": "validate", "status": 500, "times": 2},
    "commit in trouble": {"route": "commit", "status": 500, "times": 2},
    "commit is limited": {"route": "commit", "status": 429, "headers": {"Retry-After": "11"}},
    "commit is locked": {"route": "commit", "status": 409},
    "commit breaks off before": {"route": "commit", "drop": "mid"},
    "the answer to the commit is lost": {"route": "commit", "drop": "after"},
}


@pytest.mark.parametrize("fault", MENDED)
def test_it_goes_through(hub, push, out, there, naps, fault):
    hub.part_size = 20_000
    before = there.branches["main"]
    how = MENDED[fault]
    made = hub.fault(**how)
    ran = push("--json")
    assert ran.code == 0, ran.err
    assert made.times == 0, "the fault did not happen"
    assert assert_whole_or_unchanged(there, out, before)
    assert json.loads(ran.out)["commit"] == there.branches["main"]
    if how["route"] == "commit":
        landed = [r for r in there.revisions.values() if r.parent == before]
        assert len(landed) == 1
    if "headers" in how:
        assert max(naps) >= int(how["headers"]["Retry-After"])
    assert "Traceback" not in ran.err


def test_a_broken_part_alone_is_sent_again(hub, push, out, there, naps):
    hub.part_size = 20_000
    hub.fault("put", status=500, part=2)
    assert push().code == 0
    puts = [s.path for s in hub.seen if s.route == "put"]
    assert len(puts) == len(set(puts)) + 1


def test_a_repository_whose_making_was_answered_with_silence(hub, push, naps):
    hub.fault("create", drop="after")
    ran = push()
    assert ran.code == 0, ran.err
    assert "config.json" in hub.repo().files()


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, push, there, naps):
    hub.fault("commit", drop="after")
    ran = push("--create-pr", "--json")
    assert ran.code == 0, ran.err
    assert len(there.pulls) == 1
    assert json.loads(ran.out)["pull_request"].endswith("/discussions/1")


def test_a_hub_that_falls_silent_after_the_commit(hub, push, out, there, naps):
    before = there.branches["main"]
    silence = [
        hub.fault("commit", drop="after", before=lambda: hub.faults.append(info)),
    ]
    info = hub_server.Fault("info", status=503, times=ALWAYS)
    ran = push()
    assert ran.code == HubError.exit_code
    assert "does not say whether the commit landed" in ran.error
    info.times = 0
    assert silence[0].times == 0
    ran = push("--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["sent_bytes"] == 0
    assert assert_whole_or_unchanged(there, out, before)


# What ends in a sentence -------------------------------------------------------------------------

SENTENCES = {
    "the token is wrong": (
        {"route": "whoami", "status": 401},
        ["401", "HF_TOKEN", "hf auth login"],
    ),
    "the token expires on the way": ({"route": "commit", "status": 401}, ["401", "HF_TOKEN"]),
    "the token lost its scope": ({"route": "commit", "status": 403}, ["403", "write access"]),
    "uploading is forbidden": ({"route": "preupload", "status": 403}, ["403", "write access"]),
    "the repository is gated": (
        {"route": "info", "status": 403, "headers": {"X-Error-Code": "GatedRepo"}},
        ["gated", "ask for it"],
    ),
    "the repository is gone": (
        {"route": "commit", "status": 404, "headers": {"X-Error-Code": "RepoNotFound"}},
        ["no such repository", "--repo-id"],
    ),
    "the repository is locked": (
        {"route": "commit", "status": 409, "times": ALWAYS},
        ["409", "nothing of this push was committed", "same command again"],
    ),
    "a file is too large": ({"route": "put", "status": 413}, ["413", "--max-shard-size"]),
    "too many requests": (
        {"route": "preupload", "status": 429, "times": ALWAYS, "headers": {"Retry-After": "60"}},
        ["429", "in 60 s", "same command again"],
    ),
    "the storage is in trouble": (
        {"route": "put", "status": 503, "times": ALWAYS},
        ["503", "trying again did not help", "status.huggingface.co"],
    ),
    "the Hub is in trouble": (
        {"route": "commit", "status": 500, "times": ALWAYS},
        ["500", "trying again did not help"],
    ),
    "the connection breaks in every file": (
        {"route": "put", "drop": "mid", "times": ALWAYS},
        ["the connection broke", "not sent twice"],
    ),
    "the connection breaks at every commit": (
        {"route": "commit", "drop": "mid", "times": ALWAYS},
        ["the connection broke", "not sent twice"],
    ),
    "the signed address has expired": (
        {"route": "put", "status": 403},
        ["403", "its own address", "same command again"],
    ),
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_it_ends_in_a_sentence_and_the_next_run_goes_through(hub, push, out, there, naps, fault):
    how, says = SENTENCES[fault]
    before = there.branches["main"]
    made = hub.fault(**how)
    ran = push()
    assert ran.code == HubError.exit_code, ran.err
    assert "\n" not in ran.error, ran.error
    for words in says:
        assert words in ran.error
    assert hub_server.WRITE not in ran.err and "Signature" not in ran.err
    assert not assert_whole_or_unchanged(there, out, before)
    made.times = 0
    arrived = set(hub.uploaded())
    hub.seen.clear()
    ran = push()
    assert ran.code == 0, ran.err
    assert assert_whole_or_unchanged(there, out, before)
    assert not arrived & set(hub.uploaded()), "what the Hub had was sent again"


def test_one_shard_that_arrived_is_not_sent_again(hub, push, out, there, naps):
    digests = json.loads((out / "verify.json").read_text())["files"]
    first, second = (digests[f"model-0000{n}-of-00002.safetensors"] for n in (1, 2))
    fault = hub.fault("put", status=500, times=ALWAYS, where=second)
    before = there.branches["main"]
    assert push().code == HubError.exit_code
    assert hub.uploaded() == [first]
    assert not assert_whole_or_unchanged(there, out, before)
    fault.times = 0
    assert push().code == 0
    assert sorted(hub.uploaded()) == sorted([first, second])
    assert assert_whole_or_unchanged(there, out, before)


def test_somebody_else_commits_meanwhile(hub, push, out, there, naps):
    hub.fault("commit", before=lambda: hub.store.write(there, {"other.txt": b"theirs"}))
    ran = push()
    assert ran.code == HubError.exit_code
    assert "another commit changed the repository meanwhile (412" in ran.error
    assert there.resolve("main").title == "somebody else's commit"
    assert not names(out) & set(there.files())
    ran = push()
    assert ran.code == 0, ran.err
    assert hub.text("other.txt") == "theirs" and hub.text("notes.txt") == "mine"
    assert names(out) <= set(there.files())


TOKENS = {
    "may only read": (hub_server.READ, "alice/model", "the token may only read"),
    "is of another account": (hub_server.OTHER, "alice/model", "neither the account bob"),
    "is for another repository": (hub_server.FINE, "alice/model", "no write permission"),
    "is not in the organization": (hub_server.WRITE, "elsewhere/model", "nor an organization"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_token_that_may_not_write_is_known_before_anything_is_sent(
    hub, push, there, monkeypatch, case
):
    token, repo_id, says = TOKENS[case]
    monkeypatch.setenv("HF_TOKEN", token)
    ran = push("--repo-id", repo_id)
    assert ran.code == HubError.exit_code
    assert says in ran.error and "HF_TOKEN" in ran.error
    assert not hub.count("preupload") and not hub.count("create")
    dry = push("--repo-id", repo_id, "--dry-run")
    assert dry.code == 0 and "may not write" in dry.out


def test_a_fine_grained_token_for_this_repository_is_enough(hub, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.FINE)
    ran = push("--repo-id", "alice/allowed")
    assert ran.code == 0, ran.err


def test_a_private_repository_of_others_is_not_there(hub, push):
    hub.store.create("bob/secret", private=True)
    dry = push("--repo-id", "bob/secret", "--dry-run")
    assert dry.code == 0 and "which is not there" in dry.out
    ran = push("--repo-id", "bob/secret")
    assert ran.code == HubError.exit_code and "may not write" in ran.error


def test_a_gated_repository_of_others_is_said_to_be_gated(hub, push):
    hub.store.create("bob/gated", private=False).gated = True
    ran = push("--repo-id", "bob/gated", "--create-pr")
    assert ran.code == HubError.exit_code and "gated" in ran.error


def test_an_address_that_is_no_hub(hub, push, there, naps):
    hub.fault("whoami", status=200, times=ALWAYS, message="nobody")
    hub.fault("info", status=200, times=ALWAYS, message="<html>")
    ran = push()
    assert ran.code == HubError.exit_code
    assert "not that of a Hub" in ran.error and "--endpoint" in ran.error


def test_a_card_that_the_hub_does_not_take_is_known_before_anything_is_sent(hub, push, there):
    ran = push("--license", "My License!")
    assert ran.code == 7
    assert '"license" must be one of' in ran.error and "--license" in ran.error
    assert not hub.count("preupload")


def test_a_hub_without_xet(hub, out, there):
    """Where hf_xet is installed huggingface_hub takes that way; a plain server does not know it."""
    close_session()
    ran = cli_runner.run(
        "push", out, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="0"
    )
    assert ran.code == HubError.exit_code
    assert "HF_HUB_DISABLE_XET=1 uploads without Xet" in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    assert hub_server.WRITE not in ran.err
    assert set(there.files()) == {".gitattributes", "notes.txt"}


def test_killed_in_the_middle_it_goes_on(hub, out, there):
    """A process of its own, killed while the second shard is on its way."""
    digests = json.loads((out / "verify.json").read_text())["files"]
    first, second = (digests[f"model-0000{n}-of-00002.safetensors"] for n in (1, 2))
    reached, go_on = threading.Event(), threading.Event()

    def stall() -> None:
        reached.set()
        go_on.wait(60)

    fault = hub.fault("put", before=stall, where=second, times=ALWAYS)
    before = there.branches["main"]
    close_session()
    process = subprocess.Popen(
        cli_runner.command("push", out),
        env=cli_runner.environment(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert reached.wait(120), "it never came so far"
        deadline = time.monotonic() + 30
        while first not in hub.uploaded() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    fault.times = 0
    assert hub.uploaded() == [first]
    assert not assert_whole_or_unchanged(there, out, before)
    go_on.set()
    hub.seen.clear()
    ran = cli_runner.moeconv("push", out)
    assert ran.code == 0, ran.err
    assert first not in hub.uploaded()
    assert assert_whole_or_unchanged(there, out, before)
