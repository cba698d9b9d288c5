"""`moeconv push` against a Hub over HTTP: what is sent, what is refused, what is told."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import cli_runner
import hub_server
import outputs
import pytest
from huggingface_hub.utils import close_session

from moeconv.convert import beside
from moeconv.errors import HubError, NotACheckpointError, OutputError, UnverifiedError, UsageError
from moeconv.verify import plots as verify_plots
from moeconv.verify.outcome import skipped
from moeconv.verify.report import REPORT_NAME
from moeconv.verify.written import PAGE_NAME

BESIDE = {"moeconv.json", "verify.json", "verify.md", "README.md", "training_loss.png"}
PLOTS = {"verify_kl_by_position.png", "verify_logits.png"}


def actions(ran: cli_runner.Ran) -> dict[str, str]:
    return {one["name"]: one["action"] for one in json.loads(ran.out)["files"]}


def test_everything_lands_in_one_commit(hub, push, out):
    ran = push("--json")
    assert ran.code == 0, ran.err
    files = hub.repo().files()
    manifest = json.loads((out / "moeconv.json").read_text())
    assert set(files) == {*manifest["files"], *BESIDE, *PLOTS, ".gitattributes"}
    for name, record in manifest["files"].items():
        assert (files[name].size, files[name].sha256) == (record["size"], record["sha256"])
    result = json.loads(ran.out)
    head = hub.repo().resolve("main")
    assert result["commit"] == head.oid
    assert result["commit_url"] == f"{hub.url}/alice/model/commit/{head.oid}"
    assert hub.repo().revisions[head.parent].title == "initial commit"
    assert result["verified"] is True
    assert hub.count("commit") == 1
    assert not hub.repo().private


def test_the_people_s_output_names_the_commit_and_the_check(hub, push):
    ran = push()
    assert ran.code == 0
    oid = hub.repo().branches["main"]
    assert f"commit: {hub.url}/alice/model/commit/{oid}" in ran.out
    assert "the Hub lists what was sent: 14 files with their sizes and digests (14 new)" in ran.out


def test_a_second_push_sends_nothing_and_commits_nothing(hub, push):
    assert push().code == 0
    before, uploads = hub.repo().branches["main"], len(hub.uploaded())
    ran = push("--json")
    assert ran.code == 0
    assert json.loads(ran.out)["commit"] == before == hub.repo().branches["main"]
    assert set(actions(ran).values()) == {"same", "keep"}
    assert len(hub.uploaded()) == uploads == 2
    assert "nothing to commit" in ran.err


def test_a_new_conversion_replaces_and_deletes_but_leaves_strangers(hub, push, out, tmp_path):
    assert push().code == 0
    hub.store.write(hub.repo(), {"notes.txt": b"mine", "extra/other.bin": b"mine too"})
    shutil.rmtree(out)
    outputs.convert_run(outputs.write_run(tmp_path / "run", seed=1), out)
    outputs.attest(out, outputs.parity(1e-6))
    dry = push("--dry-run", "--json")
    assert actions(dry)["model.safetensors"] == "add"
    assert actions(dry)["model-00001-of-00002.safetensors"] == "delete"
    assert actions(dry)["model.safetensors.index.json"] == "delete"
    assert actions(dry)["config.json"] == "same"
    assert actions(dry)["notes.txt"] == "keep"
    ran = push("--json")
    assert ran.code == 0, ran.err
    assert actions(ran) == actions(dry)
    weights = {name for name in hub.repo().files() if name.startswith("model")}
    assert weights == {"model.safetensors"}
    assert hub.text("notes.txt") == "mine"
    assert "extra/other.bin" in hub.repo().files()


def test_a_listing_on_several_pages_is_read_whole(hub, push):
    hub.page = 3
    assert push().code == 0
    assert set(actions(push("--json")).values()) == {"same", "keep"}


# The gate ----------------------------------------------------------------------------------------


def flip_byte(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def against_another(out) -> None:
    outputs.attest(out, outputs.parity(1e-6, reference="some-folder", against="hf"))


def edit_report(out, **changes) -> None:
    path = out / "verify.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NOT_INSTALLED = [
    skipped(level, level, f"level {level} compares two models, but torch is not installed")
    for level in ("logits", "layers")
]
VOID = {
    "no report": (lambda out: (out / "verify.json").unlink(), "there is no verify.json"),
    "no JSON": (lambda out: (out / "verify.json").write_text("{"), "verify.json is no report"),
    "weights changed": (
        lambda out: flip_byte(out / "model-00002-of-00002.safetensors"),
        "speaks of other bytes than those of model-00002-of-00002.safetensors",
    ),
    "config changed": (
        lambda out: (out / "config.json").write_text((out / "config.json").read_text() + " "),
        "speaks of other bytes than those of config.json",
    ),
    "manifest changed": (
        lambda out: (out / "moeconv.json").write_text(
            (out / "moeconv.json").read_text().replace('"untied": false', '"untied":  false')
        ),
        "speaks of other bytes than those of moeconv.json",
    ),
    "report of fewer files": (lambda out: edit_report(out, files={}), "speaks of other bytes"),
    "failed": (lambda out: outputs.attest(out, outputs.parity(1.0)), "it failed (FAIL: logits"),
    "structure and weights only": (
        outputs.attest,
        "neither level logits nor level layers ran",
    ),
    "not installed": (
        lambda out: outputs.attest(out, NOT_INSTALLED),
        "layers ran (compares two models, but torch is not installed); run",
    ),
    "no weights": (
        lambda out: edit_report(out, levels={"structure": "pass", "logits": "pass"}),
        "contradicts itself: its checks do not give the verdict of level weights",
    ),
    "few positions": (
        lambda out: outputs.attest(out, outputs.parity(1e-6, length=16)),
        "level logits ran only 16 positions, and fewer than 512 hide a wrong RoPE",
    ),
    "against another model": (against_another, "compared it with another model than MaxText's"),
}


@pytest.mark.parametrize("case", VOID)
def test_what_is_not_proven_is_not_pushed(hub, push, out, case):
    spoil, says = VOID[case]
    spoil(out)
    ran = push()
    assert ran.code == UnverifiedError.exit_code
    assert says in ran.error and "moeconv verify" in ran.error and "--unverified" in ran.error
    # What the report itself tells is said before gigabytes are read.
    assert ("reading every byte" in ran.err) == ("other bytes" in says)
    assert hub.store.repos == {} and hub.uploaded() == []
    dry = push("--dry-run")
    assert dry.code == 0 and "push would refuse (--unverified)" in dry.out
    forced = push("--unverified")
    if case in ("weights changed", "config changed"):  # nobody vouches for these bytes
        assert forced.code == OutputError.exit_code and hub.store.repos == {}
        return
    assert forced.code == 0, forced.err
    card = hub.text("README.md")
    assert "**Not verified.**" in card and "- unverified" in card
    # A report of other bytes, or of none, stays here.
    other_bytes = "no report", "no JSON", "report of fewer files", "no weights"
    kept = case not in other_bytes and "changed" not in case
    assert ("verify.json" in hub.repo().files()) == kept


def test_a_warning_passes_and_is_told(hub, push, out):
    outputs.attest(out, outputs.parity(3e-3))
    ran = push()
    assert ran.code == 0, ran.err
    assert "warning: verify: logits/parity: KL" in ran.err
    card = hub.text("README.md")
    assert "**WARN: logits/parity" in card and "Not verified" not in card


def test_files_beside_the_model_stay_here(hub, push, out):
    secrets = {".env": "HF_TOKEN=hf_" + "a" * 34, "train.log": "loss", "optimizer.pt": "state"}
    for name, content in secrets.items():
        (out / name).write_text(content)
    (out / "checkpoints").mkdir()
    (out / "LICENSE").write_text("a license")
    outputs.attest(out, outputs.parity(1e-6))  # structure warns of them, which is no matter here
    dry = push("--dry-run")
    assert dry.code == 0
    for name in (*secrets, "checkpoints/"):
        assert f"{name}: stays here (not in the manifest)" in dry.out
    ran = push("--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["left_behind"] == sorted([*secrets, "checkpoints/"])
    assert not set(secrets) & set(hub.repo().files())
    assert hub.text("LICENSE") == "a license"
    for name in ("README.md", "verify.json", "verify.md"):
        told = hub.text(name)
        assert "optimizer" not in told and "train.log" not in told
    assert json.loads(hub.text("verify.json"))["verdict"] == "pass"
    assert "**PASS" in hub.text("verify.md") and "**PASS" in hub.text("README.md")


def test_a_manifest_that_names_strangers_is_refused(hub, push, out):
    for name in (".env", "../secret.json", "optimizer.pt", "logs/model.safetensors"):
        content = json.loads((out / "moeconv.json").read_text())
        content["files"][name] = {"size": 1, "sha256": "0" * 64}
        (out / "moeconv.json").write_text(json.dumps(content))
        ran = push("--unverified")
        assert ran.code == OutputError.exit_code
        assert name in ran.error and "never writes" in ran.error
        assert hub.seen == []
        del content["files"][name]
        (out / "moeconv.json").write_text(json.dumps(content))


KEY = "hf_" + "Ab1" * 12


@pytest.mark.parametrize("where", ["tokenizer_config.json", "README.md", "LICENSE", "--message"])
def test_a_key_in_a_text_is_refused_and_not_repeated(hub, push, out, where):
    arguments = ["--unverified"]
    if where == "--message":
        arguments += ["--message", f"with {KEY}"]
    elif where == "tokenizer_config.json":
        content = json.loads((out / where).read_text())
        (out / where).write_text(json.dumps({**content, "auth": KEY}))
    else:
        (out / where).write_text(f"token {KEY}")
        outputs.attest(out)
    ran = push(*arguments)
    assert ran.code == OutputError.exit_code
    assert "access key" in ran.error and KEY not in ran.err + ran.out
    assert hub.seen == []


def test_the_value_of_a_secret_variable_is_recognised(hub, push, out, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    (out / "NOTICE").write_text("logged with " + "0123456789abcdef" * 2)
    outputs.attest(out, outputs.parity(1e-6))
    ran = push()
    assert ran.code == OutputError.exit_code and "NOTICE" in ran.error


def test_the_token_is_never_said(hub, push, monkeypatch):
    for token in (hub_server.WRITE, hub_server.READ, "hf_" + "wrong" * 6):
        monkeypatch.setenv("HF_TOKEN", token)
        for arguments in (["--dry-run"], [], ["--json"]):
            ran = push(*arguments)
            assert token not in ran.out + ran.err
            assert "X-Amz-Signature" not in ran.out + ran.err
    for entry in hub.repo().files().values():
        assert hub_server.WRITE.encode() not in hub.store.read(entry)
    assert all(seen.token is None for seen in hub.seen if seen.route == "put")


# Where to, and who -------------------------------------------------------------------------------


def test_the_newest_output_below_is_taken_and_named(hub, made, tmp_path, monkeypatch):
    base = tmp_path / "work"
    old = outputs.copy(made, base / "a" / "old")
    new = outputs.copy(made, base / "b" / "c" / "new")
    (base / "run").mkdir()
    (base / "run" / "moeconv.json").write_text('{"format": "moeconv-run"}')
    os.utime(old / "moeconv.json", (1, 1))
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
    assert ran.code == NotACheckpointError.exit_code and "has no moeconv.json" in ran.error


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
    assert "without a token" in told["repository"]
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


def test_a_file_that_changes_meanwhile_is_not_committed(hub, push, out):
    weights = out / "model-00001-of-00002.safetensors"

    def change() -> None:
        flip_byte(weights)
        os.utime(weights, (time.time() + 5,) * 2)

    hub.fault("preupload", before=change)
    ran = push()
    assert ran.code != 0
    assert set(hub.repo().files()) == {".gitattributes"}
    assert "Traceback" not in ran.err


def test_a_gitignore_on_the_hub_is_found_out(hub, push, monkeypatch):
    """The Hub may leave files out of a commit; the listing afterwards tells."""
    commit = hub.store.commit

    def forgetful(repo, revision, lines, **how):
        return commit(repo, revision, [x for x in lines if x["value"].get("path") != "config.json"],
                      **how)  # fmt: skip

    monkeypatch.setattr(hub.store, "commit", forgetful)
    ran = push()
    assert ran.code == HubError.exit_code
    assert "config.json is missing" in ran.error and "landed" in ran.error


def test_what_is_published_names_no_folder_of_this_machine(hub, push, out, made, tmp_path):
    assert str(made.parent) in (out / "moeconv.json").read_text()
    assert push().code == 0
    for name, entry in hub.repo().files().items():
        raw = hub.store.read(entry)
        for path in (str(tmp_path), str(made.parent), os.path.expanduser("~"), os.getcwd()):
            assert path.encode() not in raw, name
    published = json.loads(hub.text("moeconv.json"))
    assert published["source"]["path"] == "run/checkpoints/7/items"
    assert published["model"]["rope_theta"]["source"] == "sidecar: moeconv.json"
    report = json.loads(hub.text("verify.json"))
    files = hub.repo().files()
    for name, digest in report["files"].items():
        assert hashlib.sha256(hub.store.read(files[name])).hexdigest() == digest


def test_a_published_model_can_be_pushed_again(hub, push, tmp_path, made):
    assert push().code == 0
    copy = tmp_path / "downloaded"
    copy.mkdir()
    for name, entry in hub.repo().files().items():
        (copy / name).write_bytes(hub.store.read(entry))
    ran = cli_runner.moeconv("push", copy, "--json")
    assert ran.code == 0, ran.err
    assert set(actions(ran).values()) == {"same", "keep"}


HF = (sys.executable, "-m", "huggingface_hub.cli.hf")


def test_what_was_downloaded_is_no_stranger_to_verify(hub, push, out, tmp_path):
    """Nor is what people put beside it: `verify DOWNLOADED` finds nothing to warn of."""
    for name in ("LICENSE", "NOTICE"):
        (out / name).write_text("words\n")
    outputs.attest(out, outputs.parity(1e-6))
    assert push().code == 0
    copy = tmp_path / "downloaded"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "huggingface_hub.cli.hf",
            "download",
            "alice/model",
            "--local-dir",
            copy,
        ],
        env=cli_runner.environment(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"),
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert {"training_loss.png", "LICENSE", "NOTICE", ".cache"} <= set(os.listdir(copy))
    ran = cli_runner.moeconv("verify", copy, "--level", "structure", "--json")
    assert ran.code == 0, ran.err
    files = next(c for c in json.loads(ran.out)["checks"] if c["name"] == "files")
    assert files["status"] == "pass", files
    (copy / "notes.txt").write_text("mine")
    ran = cli_runner.moeconv("verify", copy, "--level", "structure", "--json")
    files = next(c for c in json.loads(ran.out)["checks"] if c["name"] == "files")
    assert (files["status"], files["tensors"]) == ("warn", ["notes.txt"])


def test_the_list_of_what_may_lie_beside_is_whole():
    assert set(beside.VERDICT) == {REPORT_NAME, PAGE_NAME, *verify_plots.PLOTS}


def test_a_manifest_that_describes_no_model_is_damaged(hub, push, out):
    path = out / "moeconv.json"
    content = json.loads(path.read_text())
    del content["model"]["layer_kinds"]
    path.write_text(json.dumps(content))
    ran = push()
    assert ran.code == OutputError.exit_code
    assert "is not a manifest that this moeconv can read" in ran.error


# What the bare install has not.
NO_EXTRAS = """
import importlib.machinery, sys
absent = {"matplotlib", "torch", "transformers", "jax", "maxtext", "PIL"}
real = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in absent else real(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
from moeconv.cli.main import main
main()
"""


def test_the_bare_install_pushes(hub, out):
    """Without matplotlib there is no plot, which is said; everything else goes as always."""
    close_session()
    ran = subprocess.run(
        [sys.executable, "-c", NO_EXTRAS, "push", out],
        env=cli_runner.environment(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert "matplotlib is not installed, so the card has no plot of the losses" in ran.stderr
    assert "training_loss.png" not in hub.repo().files()
    card = hub.text("README.md")
    assert "last loss" in card and "training_loss.png" not in card
