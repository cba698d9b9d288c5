"""Which output `moeconv push` sends, to which repository, branch or pull request."""

import json
import os
import shutil

import cli_runner
import outputs
import pytest
from huggingface_hub.utils import close_session
from pushed import actions

from moeconv.errors import HubError, NotACheckpointError, OutputError, UsageError


def test_the_newest_output_below_is_taken_and_named(hub, made, tmp_path, monkeypatch):
    base = tmp_path / "work"
    old = outputs.copy(made, base / "a" / "old")
    new = outputs.copy(made, base / "b" / "c" / "new")
    (base / "run").mkdir()
    (base / "run" / "moeconv.json").write_text('{"format": "moeconv-run"}')
    os.utime(old / "moeconv_manifest.json", (1, 1))
    monkeypatch.chdir(base)
    ran = cli_runner.moeconv("push", "--dry-run")
    assert ran.code == 0
    assert f"OUT is {new}, the newest output of moeconv convert below {base}" in ran.err
    monkeypatch.chdir(base / "run")
    ran = cli_runner.moeconv("push", "--dry-run")
    assert ran.code == UsageError.exit_code and "moeconv push OUT" in ran.error


def test_what_is_no_output_is_said(hub, tmp_path):
    ran = cli_runner.moeconv("push", tmp_path / "nothing")
    assert ran.code == NotACheckpointError.exit_code and "nothing does not exist" in ran.error
    ran = cli_runner.moeconv("push", tmp_path)
    assert ran.code == NotACheckpointError.exit_code and "has no moeconv_manifest.json" in ran.error


def test_a_missing_file_is_named(hub, push, out):
    (out / "model-00001-of-00002.safetensors").unlink()
    ran = push("--unverified")
    assert ran.code == OutputError.exit_code
    assert "model-00001-of-00002.safetensors" in ran.error


@pytest.mark.parametrize("wrong", ["no-namespace", "a/b/c", "alice/-x", "alice/mo del"])
def test_a_repo_id_that_cannot_be_is_refused(hub, push, wrong):
    ran = push("--repo-id", wrong)
    assert ran.code == UsageError.exit_code
    assert "NAMESPACE/NAME" in ran.error and "\n" not in ran.error
    assert hub.seen == []


def test_nobody_said_where(hub, tmp_path):
    run = outputs.write_run(tmp_path / "run", facts=None)
    out = outputs.convert_run(run, tmp_path / "bare")
    ran = cli_runner.moeconv("push", out, "--dry-run")
    assert ran.code == UsageError.exit_code and "--repo-id NAMESPACE/NAME" in ran.error


def test_a_dry_run_without_a_token_tells_what_it_can(hub, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    ran = push("--dry-run", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["account"] is None and told["card_checked"] is True
    assert set(actions(ran).values()) == {"add"}
    assert "needs a token" in told["repository"]
    assert hub.store.repos == {}
    ran = push()
    assert ran.code == HubError.exit_code
    assert "there is no token; set HF_TOKEN" in ran.error
    assert "reading every byte" not in ran.err


def test_a_dry_run_without_the_hub_says_what_is_unknown(push, monkeypatch, naps):
    close_session()
    ran = push("--dry-run", "--endpoint", "http://127.0.0.1:9")
    assert ran.code == 0, ran.err
    assert "warning: what is on the Hub: " in ran.err
    assert "warning: whether the card is valid: " in ran.err
    assert "not validated by the Hub" in ran.out and "unknown" in ran.out
    assert "of which nothing is known" in ran.out
    ran = push("--endpoint", "http://127.0.0.1:9")
    assert ran.code == HubError.exit_code and "the connection broke" in ran.error


def test_a_dry_run_changes_nothing(hub, push):
    ran = push("--dry-run")
    assert ran.code == 0
    assert hub.store.repos == {} and not hub.uploaded() and hub.count("create") == 0
    assert "account: alice, may write" in ran.out
    assert "verified: yes, levels structure pass, weights pass, logits pass" in ran.out
    assert "# model" in ran.out and "library_name: transformers" in ran.out


def test_private_is_made_private_and_a_public_one_is_not_taken_for_it(hub, push):
    assert push("--private").code == 0
    assert hub.repo().private
    assert push("--private").code == 0
    ran = push("--private", "--repo-id", "lab/open")
    assert ran.code == 0
    assert push("--repo-id", "alice/public").code == 0
    ran = push("--private", "--repo-id", "alice/public")
    assert ran.code == UsageError.exit_code and "is there and public" in ran.error


def test_a_branch_is_made_and_main_stays(hub, push):
    assert push().code == 0
    main = hub.repo().branches["main"]
    ran = push("--revision", "v2", "--message", "second", "--json")
    assert ran.code == 0, ran.err
    assert hub.repo().branches["main"] == main
    assert 'revision="v2"' in hub.text("README.md", revision="v2")
    assert hub.repo().resolve("v2").title == "second"
    assert json.loads(ran.out)["revision"] == "v2"


def test_a_branch_loses_what_is_stale_as_main_would(hub, push, out, tmp_path):
    assert push().code == 0
    shutil.rmtree(out)
    outputs.convert_run(outputs.write_run(tmp_path / "run", seed=1), out)
    outputs.attest(out, outputs.parity(1e-6))
    ran = push("--revision", "v2", "--json")
    assert ran.code == 0, ran.err
    assert actions(ran)["model-00002-of-00002.safetensors"] == "delete"
    assert "model-00002-of-00002.safetensors" in hub.repo().files("main")
    assert "model-00002-of-00002.safetensors" not in hub.repo().files("v2")


def test_a_branch_of_a_new_repository(hub, push):
    ran = push("--revision", "v1")
    assert ran.code == 0, ran.err
    assert set(hub.repo().files("main")) == {".gitattributes"}
    assert "config.json" in hub.repo().files("v1")


@pytest.mark.parametrize("name", ["bob/model", "lab/model"])
def test_one_pull_request_is_opened_and_gone_on_with(hub, push, out, name):
    """Also where the account may not write, as in bob's repository."""
    repo = hub.store.create(name, private=False)
    arguments = ["--repo-id", name, "--create-pr", "--json"]
    first = json.loads(push(*arguments).out)
    assert first["pull_request"] == f"{hub.url}/{name}/discussions/1"
    assert first["revision"] == "refs/pr/1"
    (out / "LICENSE").write_text("a license")
    outputs.attest(out, outputs.parity(1e-6))
    assert "pull request 1 (open, goes on)" in push(*arguments[:3], "--dry-run").out
    ran = push(*arguments, "--message", "another title")
    assert ran.code == 0, ran.err
    second = json.loads(ran.out)
    assert [p.num for p in repo.pulls] == [1]
    assert second["pull_request"] == first["pull_request"]
    assert hub.text("LICENSE", name, "refs/pr/1") == "a license"
    assert set(repo.files("main")) == {".gitattributes"}
    assert {n: a for n, a in actions(ran).items() if a not in ("same", "keep")} == {
        "LICENSE": "add",
        "verify.json": "replace",
    }
    repo.pulls[0].status = "merged"
    third = json.loads(push(*arguments).out)
    assert third["pull_request"].endswith("/2")


def test_create_pr_and_a_branch_exclude_each_other(hub, push):
    ran = push("--create-pr", "--revision", "v1")
    assert ran.code == UsageError.exit_code and "--revision" in ran.error


def test_a_token_does_not_go_over_an_open_line(push):
    ran = push("--endpoint", "http://hub.example.org")
    assert ran.code == UsageError.exit_code and "unencrypted" in ran.error
    ran = push("--endpoint", "ftp://hub.example.org")
    assert ran.code == UsageError.exit_code


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_wrong_endpoint_is_refused_before_the_model_is_read(push, out, flags):
    (out / "model-00001-of-00002.safetensors").unlink()  # what reading it would find
    ran = push("--endpoint", "hub.example.org", *flags)
    assert ran.code == UsageError.exit_code
    assert "--endpoint hub.example.org is not an address" in ran.error
    assert push(*flags).code == OutputError.exit_code
