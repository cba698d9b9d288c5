"""Only bytes that the manifest or the report is bound to leave the machine, and only those."""

import json
import os

import outputs
import pytest

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.errors import OutputError
from moeconv.hub.weights import BLOCK, Weights
from moeconv.maxtext.sidecar import SIDECAR_NAMES

PLOT = "verify_logits.png"


def test_a_plot_of_another_picture_stays_here(hub, push, out):
    other = (out / "verify_kl_by_position.png").read_bytes()
    (out / PLOT).write_bytes(other)
    ran = push()
    assert ran.code == 0, ran.err
    assert f"warning: {PLOT} stays here: no verify.json has its digest" in ran.err
    assert PLOT not in hub.repo().files()
    assert PLOT not in hub.text("README.md") and PLOT not in hub.text("verify.md")


def test_a_report_of_an_older_release_has_no_digests_of_plots(hub, push, out):
    report = json.loads((out / "verify.json").read_text())
    del report["beside"]
    (out / "verify.json").write_text(json.dumps(report))
    ran = push()
    assert ran.code == 0, ran.err
    assert f"{PLOT} stays here" in ran.err and PLOT not in hub.repo().files()
    assert json.loads(hub.text("verify.json"))["verdict"] == "pass"


def test_a_license_that_verify_has_not_seen_stays_here(hub, push, out):
    (out / "LICENSE").write_text("words")
    ran = push()
    assert ran.code == 0 and "LICENSE stays here" in ran.err
    assert "LICENSE" not in hub.repo().files()
    outputs.attest(out, outputs.parity(1e-6))
    assert push().code == 0 and hub.text("LICENSE") == "words"


def test_weights_that_are_swapped_after_the_gate_do_not_go_out(hub, push, out, tmp_path):
    """Another file of the same size and times, put in its place while the Hub is asked."""
    name = "model-00001-of-00002.safetensors"
    weights, secret = out / name, tmp_path / "secret"
    status = weights.stat()
    secret.write_bytes(b"s" * status.st_size)
    os.utime(secret, ns=(status.st_atime_ns, status.st_mtime_ns))
    hub.fault("info", before=lambda: os.replace(secret, weights), times=1)
    ran = push()
    assert ran.code == OutputError.exit_code and name in ran.error
    assert hub.uploaded() == []


def test_weights_that_are_written_to_meanwhile_do_not_go_out(hub, push, out):
    name = "model-00001-of-00002.safetensors"
    raw, status = (out / name).read_bytes(), (out / name).stat()

    def write() -> None:
        with (out / name).open("r+b") as file:
            file.write(b"s" * len(raw))
        os.utime(out / name, ns=(status.st_atime_ns, status.st_mtime_ns))

    hub.fault("lfs_batch", before=write)
    ran = push()
    assert ran.code == OutputError.exit_code and "was changed while" in ran.error
    assert name not in hub.repo().files()
    assert json.loads((out / "moeconv_manifest.json").read_text())["files"][name]["sha256"] not in (
        hub.uploaded()
    )


def test_texts_are_sent_as_they_were_looked_at(hub, push, out):
    path = out / "tokenizer_config.json"
    before = path.read_bytes()
    hub.fault("info", before=lambda: path.write_bytes(b'{"a": "of somebody else"}'))
    assert push().code == 0
    assert hub.text(path.name).encode() == before


def test_no_block_is_handed_out_that_is_not_the_one_hashed(tmp_path):
    path = tmp_path / "model.safetensors"
    content = os.urandom(2 * BLOCK + 100)
    path.write_bytes(content)
    weights = Weights.read(tmp_path, path.name)
    with weights.descriptor() as descriptor, weights.reader(descriptor) as file:
        assert file.seek(0, os.SEEK_END) == len(content)
        file.seek(BLOCK - 7)
        assert file.read(14) == content[BLOCK - 7 : BLOCK + 7]
        file.seek(0)
        assert file.read() == content
        with path.open("r+b") as other:
            other.seek(2 * BLOCK)
            other.write(b"x" * 50)
        file.seek(0)
        assert file.read(BLOCK) == content[:BLOCK]
        file.seek(2 * BLOCK)
        with pytest.raises(OutputError, match="was changed while"):
            file.read(1)


def test_a_key_in_a_header_of_weights_is_found(hub, push, out):
    """In the name of a tensor, or the metadata."""
    path = out / "model-00001-of-00002.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["note"] = "hf_" + "aB3d" * 9
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    ran = push("--unverified")
    assert ran.code == OutputError.exit_code and "access key" in ran.error
    assert hub.seen == []


@pytest.mark.parametrize("sidecar", SIDECAR_NAMES)
def test_a_run_is_not_an_output(hub, push, out, sidecar):
    (out / MANIFEST_NAME).unlink()
    (out / sidecar).write_text('{"format": "moeconv-run", "version": 1}')
    ran = push("--dry-run")
    assert ran.code == 3 and "is a training run; give the output of" in ran.error
