"""`moeconv push` against a Hub over HTTP: what is sent, where to, and what is told."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import cli_runner
import outputs
from huggingface_hub.utils import close_session
from pushed import actions, flip_byte

from moeconv.artifact import names as beside
from moeconv.errors import HubError
from moeconv.verification.report import plots as verify_plots
from moeconv.verification.report.files import PAGE_NAME
from moeconv.verification.report.report import REPORT_NAME

BESIDE = {"moeconv_manifest.json", "verify.json", "verify.md", "README.md", "training_loss.png"}

PLOTS = {"verify_kl_by_position.png", "verify_logits.png"}


def test_everything_lands_in_one_commit(hub, push, out):
    ran = push("--json")
    assert ran.code == 0, ran.err
    files = hub.repo().files()
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
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
    assert str(made.parent) in (out / "moeconv_manifest.json").read_text()
    assert push().code == 0
    for name, entry in hub.repo().files().items():
        raw = hub.store.read(entry)
        for path in (str(tmp_path), str(made.parent), os.path.expanduser("~"), os.getcwd()):
            assert path.encode() not in raw, name
    published = json.loads(hub.text("moeconv_manifest.json"))
    assert published["source"]["path"] == "run/checkpoints/7/items"
    assert published["model"]["rope_theta"]["source"] == "sidecar: moeconv_run.json"
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
