"""Outputs of moeconv 0.1.0, whose manifest is moeconv.json, are verified and pushed as they are."""

import hashlib
import json
import shutil

import cli_runner
import outputs
import pytest
from old_names import age_output
from pushed import actions

from moeconv.verification.checks import Status


@pytest.fixture
def old(out):
    """An output of moeconv 0.1.0, verified by this moeconv."""
    age_output(out)
    assert outputs.attest(out, outputs.parity(1e-6)).verdict is Status.PASS
    return out


def manifests(hub) -> set[str]:
    return {name for name in hub.repo().files() if name.startswith("moeconv")}


def test_it_is_pushed_under_its_own_name(hub, push, old):
    assert push().code == 0
    assert manifests(hub) == {"moeconv.json"}
    assert json.loads(hub.text("moeconv.json"))["version"] == 1
    sent = hub.store.read(hub.repo().files()["moeconv.json"])
    bound = json.loads(hub.text("verify.json"))["files"]
    assert bound["moeconv.json"] == hashlib.sha256(sent).hexdigest()
    assert "`moeconv.json` has the SHA-256" in hub.text("README.md")
    assert set(actions(push("--json")).values()) == {"same", "keep"}


def test_its_bytes_are_those_that_were_verified(hub, push, old):
    path = old / "moeconv.json"
    path.write_text(path.read_text().replace('"untied": false', '"untied":  false'))
    ran = push()
    assert ran.code != 0 and "speaks of other bytes than those of moeconv.json" in ran.error
    assert hub.seen == []


def test_the_newest_output_may_be_old(hub, old, monkeypatch):
    monkeypatch.chdir(old.parent)
    ran = cli_runner.moeconv("push", "--dry-run")
    assert ran.code == 0 and f"OUT is {old}, the newest output" in ran.err


def test_a_new_output_takes_its_place_on_the_hub(hub, push, old, made):
    """Whatever it named goes with it: weights in two files beside one in one file, say."""
    named = set(json.loads((old / "moeconv.json").read_text())["files"])
    assert push().code == 0
    shutil.rmtree(old)
    outputs.convert_run(made.parent / "run", old)
    outputs.attest(old, outputs.parity(1e-6))
    ran = push("--json")
    assert ran.code == 0, ran.err
    done = actions(ran)
    assert (done["moeconv.json"], done["moeconv_manifest.json"]) == ("delete", "add")
    assert {name for name, action in done.items() if action == "delete"} == {
        "moeconv.json",
        *(named - {path.name for path in old.iterdir()}),
    }
    assert manifests(hub) == {"moeconv_manifest.json"}
    assert hub.count("commit") == 2


def test_an_old_output_takes_a_new_one_s_place(hub, push, out):
    assert push().code == 0
    age_output(out)
    outputs.attest(out, outputs.parity(1e-6))
    assert push().code == 0
    assert manifests(hub) == {"moeconv.json"}


@pytest.mark.parametrize("content", ['{"format": "moeconv-run", "version": 1}', "[]", "no JSON"])
def test_what_else_has_the_old_name_on_the_hub_stays(hub, push, content):
    assert push().code == 0
    hub.store.write(hub.repo(), {"moeconv.json": content.encode()})
    ran = push("--json")
    assert ran.code == 0 and actions(ran)["moeconv.json"] == "keep"
    assert hub.text("moeconv.json") == content


def test_of_two_manifests_the_new_one_counts(hub, push, out):
    (out / "moeconv.json").write_text("{}")
    assert outputs.attest(out, outputs.parity(1e-6)).verdict is Status.PASS
    assert push().code == 0
    assert manifests(hub) == {"moeconv_manifest.json"}
