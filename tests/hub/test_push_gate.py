"""The gate of `moeconv push`: what is not proven, not ours, or secret stays here."""

import json

import hub_server
import outputs
import pytest
from pushed import flip_byte

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.errors import OutputError, UnverifiedError
from moeconv.verification.checks import CheckFactory


def against_another(out) -> None:
    outputs.attest(out, outputs.parity(1e-6, reference="some-folder", against="hf"))


def edit_report(out, **changes) -> None:
    path = out / "verify.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NOT_INSTALLED = [
    CheckFactory(level).skipped(
        level, f"level {level} compares two models, but torch is not installed"
    )
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
        lambda out: (out / MANIFEST_NAME).write_text(
            (out / MANIFEST_NAME).read_text().replace('"untied": false', '"untied":  false')
        ),
        "speaks of other bytes than those of moeconv_manifest.json",
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
        content = json.loads((out / "moeconv_manifest.json").read_text())
        content["files"][name] = {"size": 1, "sha256": "0" * 64}
        (out / "moeconv_manifest.json").write_text(json.dumps(content))
        ran = push("--unverified")
        assert ran.code == OutputError.exit_code
        assert name in ran.error and "never writes" in ran.error
        assert hub.seen == []
        del content["files"][name]
        (out / "moeconv_manifest.json").write_text(json.dumps(content))


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


def test_a_manifest_that_describes_no_model_is_damaged(hub, push, out):
    path = out / "moeconv_manifest.json"
    content = json.loads(path.read_text())
    del content["model"]["layer_kinds"]
    path.write_text(json.dumps(content))
    ran = push()
    assert ran.code == OutputError.exit_code
    assert "is not a manifest that this moeconv can read" in ran.error
