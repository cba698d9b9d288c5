"""A model on the Hub becomes the run that its folder becomes; only what is needed is fetched."""

import re

import hub_server
import numpy as np
import pytest
import synthetic
from cli_runner import moeconv
from hub_server import Hub

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.errors import NotACheckpointError, StorageError, TensorError, UsageError
from moeconv.hf import hub_client
from moeconv.hf.hub_client import Limits
from moeconv.maxtext.checkpoint import open_stored
from moeconv.untrusted import strict_json

NAME, ADDRESS = "lab/model", "hf://lab/model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in several files."""
    folder = tmp_path_factory.mktemp("read")
    run = synthetic.write(folder / "run", block="qwen3_moe")
    options = ("--config", run.config_file(folder), "--max-shard-size", "60kB")
    assert moeconv("convert", run.run, folder / "model", *options).code == 0
    return folder / "model"


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    """What the folder itself becomes."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert moeconv("convert", folder, out).code == 0
    return out


@pytest.fixture
def served(hub, folder):
    """The Hub, with the folder as a private model; weights are in LFS, as they are there."""
    repo = hub.store.create(NAME, private=True)
    small = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}
    hub.store.write(repo, small)
    lines = [{"key": "header", "value": {"summary": "weights", "description": ""}}]
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        value = {"path": path.name, "oid": hub.store.put(raw), "size": len(raw)}
        lines.append({"key": "lfsFile", "value": value})
    hub.store.commit(repo, "main", lines, create_pr=False, author="alice")
    return hub


def commit_of(hub):
    return hub.repo(NAME).branches["main"]


def values(run):
    stored = open_stored(str(run), part="model")
    return {name: np.array(stored.arrays.reader(name).read(())) for name in stored.arrays.info}


def assert_same(out, local):
    """The arrays have the same bytes; the other files are the same but for where they are from."""
    one, other = values(out), values(local)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name
    for name in ("config.yml", "moeconv_run.json"):
        assert (out / name).read_bytes() == (local / name).read_bytes()


def weights(hub):
    """Requests for weights."""
    return [s for s in hub.seen if s.route == "resolve" and s.path.endswith(".safetensors")]


def weights_size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def source_of(out):
    return strict_json.loads((out / MANIFEST_NAME).read_bytes())["source"]


def test_the_run_is_that_of_the_folder(served, folder, local, tmp_path):
    out = tmp_path / "out"
    ran = moeconv("convert", ADDRESS, out)
    assert ran.code == 0, ran.err
    assert_same(out, local)
    here, there = source_of(local), source_of(out)
    assert there["path"] == f"{ADDRESS}@{commit_of(served)}" and here["path"] == str(folder)
    assert {**here, "path": ""} == {**there, "path": ""}
    fetched = sum(
        s.sent for s in served.seen if s.route == "resolve" and s.path.endswith(".safetensors")
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert fetched == size  # each byte once
    assert {s.token for s in served.seen} == {hub_server.WRITE}


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2"])
def test_chunks_of_a_mesh_are_fetched_once(served, folder, tmp_path, mesh):
    """A chunk that is no row of bytes of its tensor costs no byte and no request more."""
    for source, out in ((folder, "local"), (ADDRESS, "out")):
        ran = moeconv("convert", source, tmp_path / out, "--shards", mesh)
        assert ran.code == 0, ran.err
    assert_same(tmp_path / "out", tmp_path / "local")
    asked = weights(served)
    assert sum(s.sent for s in asked) == weights_size(folder)
    index = strict_json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert len(asked) <= len(index["weight_map"]) + 2 * len(list(folder.glob("*.safetensors")))


@pytest.mark.parametrize("size", [600])
@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2"])
def test_ranges_that_make_no_whole_chunk(served, folder, tmp_path, monkeypatch, mesh, size):
    """They wait in the scratch file until all of their chunk has come."""
    assert moeconv("convert", folder, tmp_path / "local", "--shards", mesh).code == 0
    monkeypatch.setattr("moeconv.planning.orbax_output.CHUNK_BYTES", size)
    ran = moeconv("convert", ADDRESS, tmp_path / "out", "--shards", mesh)
    assert ran.code == 0, ran.err
    assert_same(tmp_path / "out", tmp_path / "local")
    assert sum(s.sent for s in weights(served)) == weights_size(folder)


def test_a_revision(served, folder, tmp_path):
    first = commit_of(served)
    config = strict_json.loads((folder / "config.json").read_bytes())
    served.store.write(served.repo(NAME), {"config.json": b"{"})
    assert moeconv("convert", ADDRESS, tmp_path / "a").code != 0
    assert config["model_type"] == "qwen3_moe"
    assert moeconv("convert", f"{ADDRESS}@{first}", tmp_path / "b").code == 0
    served.repo(NAME).branches["v1"] = first
    assert moeconv("convert", f"{ADDRESS}@v1", tmp_path / "c").code == 0
    assert source_of(tmp_path / "b") == source_of(tmp_path / "c")


def test_dry_run_says_what_it_will_download(served, tmp_path):
    ran = moeconv("convert", ADDRESS, tmp_path / "out", "--dry-run")
    assert ran.code == 0, ran.err
    assert re.search(rf"downloads [\d.]+ kB of {ADDRESS}@{commit_of(served)}\b", ran.out)
    assert not (tmp_path / "out").exists()


def test_the_token_goes_to_the_hub_alone(served, tmp_path, local):
    """Large files are elsewhere, at signed addresses (LFS, Xet)."""
    with Hub(tmp_path / "store") as store:
        store.store.blobs = served.store.blobs
        served.elsewhere = store.url
        ran = moeconv("convert", ADDRESS, tmp_path / "out")
        assert ran.code == 0, ran.err
        assert_same(tmp_path / "out", local)
        assert len(store.seen) > 10 and {s.route for s in store.seen} == {"stored"}
        assert {s.token for s in store.seen} == {None}


def test_no_address_without_encryption(served, tmp_path):
    served.elsewhere = "http://example.org"
    ran = moeconv("convert", ADDRESS, tmp_path / "out")
    assert ran.code == StorageError.exit_code
    assert "http://example.org, which is unencrypted" in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("drop", ["half", "mid"])
def test_what_breaks_off_is_gone_on_with(served, tmp_path, local, naps, drop):
    served.fault("resolve", drop=drop, times=5, skip=12, where=".safetensors")
    ran = moeconv("convert", ADDRESS, tmp_path / "out", "--jobs", "1")
    assert ran.code == 0, ran.err
    assert_same(tmp_path / "out", local)
    assert sum(s.ended == "broken" for s in served.seen) == 5


def test_retry_after_is_heeded(served, tmp_path, local, naps):
    busy = {"status": 503, "headers": {"Retry-After": "7"}}
    served.fault("resolve", times=2, skip=12, where=".safetensors", **busy)
    ran = moeconv("convert", ADDRESS, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert_same(tmp_path / "out", local)
    assert [nap for nap in naps if nap >= 7] == [8.0, 8.0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 503}, "the Hub answers with 503"),
        ({"drop": "mid"}, "the Hub cannot be reached"),
        ({"status": 429, "headers": {"Retry-After": "4000"}}, "takes no more requests for 4000 s"),
        ({"status": 403}, "the Hub refuses your token (403)"),
    ],
)
def test_a_failure_that_stays_and_resume(served, tmp_path, local, naps, fault, words):
    out = tmp_path / "out"
    made = served.fault("resolve", times=10**6, skip=40, where=".safetensors", **fault)
    ran = moeconv("convert", ADDRESS, out, "--jobs", "1")
    assert ran.code == StorageError.exit_code
    assert words in ran.error and f"{ADDRESS}@{commit_of(served)}/model-0" in ran.error
    assert not out.exists()
    made.times = 0
    ran = moeconv("convert", ADDRESS, out, "--resume")
    assert ran.code == 0, ran.err
    assert re.search(r"resuming: [1-9]\d* of \d+ units", ran.err)
    assert_same(out, local)


def test_a_silence_has_an_end(served, tmp_path, monkeypatch, naps):
    import threading

    monkeypatch.setattr(hub_client, "LIMITS", Limits(still=0.3, stalls=2))
    held = threading.Event()
    served.fault("resolve", times=10**6, skip=20, where=".safetensors", before=held.wait)
    ran = moeconv("convert", ADDRESS, tmp_path / "out")
    held.set()
    assert ran.code == StorageError.exit_code
    assert "gives no answer within 0.3 s, 2 times in a row; go on with --resume" in ran.error


def test_a_file_that_changes_is_refused(served, tmp_path):
    """A commit is for ever; a mirror may not know that."""
    files = served.repo(NAME).files()
    name = sorted(n for n in files if n.endswith(".safetensors"))[0]

    def change():
        raw = bytearray(served.store.read(files[name]))
        raw[-1] ^= 1
        entry = served.store.large(served.store.put(bytes(raw)), len(raw))
        files[name] = entry

    served.fault("resolve", skip=3, where=name, before=change)
    ran = moeconv("convert", ADDRESS, tmp_path / "out", "--jobs", "1")
    assert ran.code == TensorError.exit_code
    assert f"{name} is not the file that was listed when reading began" in ran.error
    assert list(tmp_path.glob("*out*")) == []


def test_a_server_without_ranges_is_left(served, tmp_path, monkeypatch):
    monkeypatch.setattr(
        hub_server._Handler, "_ranged", lambda self, content, headers: (200, content, headers)
    )
    ran = moeconv("convert", ADDRESS, tmp_path / "out")
    assert ran.code == StorageError.exit_code
    assert "does not answer with the range that was asked for (200" in ran.error


@pytest.mark.parametrize(
    ("address", "token", "kind", "words"),
    [
        ("hf://lab/absent", hub_server.WRITE, NotACheckpointError, "no repository on the Hub that"),
        (ADDRESS, hub_server.OTHER, NotACheckpointError, "if it is private set HF_TOKEN"),
        (ADDRESS, "tok-wrong-000000", StorageError, "the Hub refuses your token (401)"),
        (f"{ADDRESS}@nowhere", hub_server.WRITE, NotACheckpointError, "has no such revision"),
        ("hf://model", hub_server.WRITE, UsageError, "write hf://namespace/name"),
        ("hf://datasets/lab/model", hub_server.WRITE, UsageError, "write hf://namespace/name"),
    ],
)
def test_what_cannot_be_read(served, tmp_path, monkeypatch, address, token, kind, words):
    monkeypatch.setenv("HF_TOKEN", token)
    for args in (("convert", address, tmp_path / "out"), ("inspect", address)):
        ran = moeconv(*args)
        assert ran.code == kind.exit_code, ran.err
        assert ran.error.startswith(address) and words in ran.error
        assert token not in ran.err


def test_a_gated_model(served, tmp_path, monkeypatch):
    repo = served.repo(NAME)
    repo.private, repo.gated = False, True
    monkeypatch.setenv("HF_TOKEN", hub_server.OTHER)
    ran = moeconv("convert", ADDRESS, tmp_path / "out")
    assert ran.code == StorageError.exit_code
    assert "is gated; accept its terms on" in ran.error


def test_inspect_reads_headers_alone(served, folder):
    ran = moeconv("inspect", ADDRESS, "--json")
    assert ran.code == 0, ran.err
    other = moeconv("inspect", folder, "--json")
    found, here = (strict_json.loads(each.out.encode()) for each in (ran, other))
    assert found.pop("model") == f"{ADDRESS}@{commit_of(served)}"
    del here["model"], here["warnings"], found["warnings"]
    assert found.pop("files").items() >= here.pop("files").items()
    for fields in (found["fields"], here["fields"]):
        for field in fields.values():
            field["source"] = (field["source"] or "").rsplit("/", 1)[-1]
    assert found == here
    assert sum(s.sent for s in weights(served)) < weights_size(folder) - found["bytes"] + 100


def test_its_weights_may_be_of_another_format(served, tmp_path):
    repo = served.store.create("lab/gguf", private=False)
    served.store.write(repo, {"model.gguf": b"GGUF", "README.md": b""})
    ran = moeconv("convert", "hf://lab/gguf", tmp_path / "out")
    assert ran.code == NotACheckpointError.exit_code
    assert "/model.gguf is GGUF" in ran.error
