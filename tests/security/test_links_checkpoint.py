"""A checkpoint on this machine is read within the folder that the user named, and nowhere else."""

import os
import shutil
from pathlib import Path

import planted
import pytest
import synthetic
import tensorstore as ts

from moeconv.errors import ConfigError, NotACheckpointError
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.orbax.locate import locate
from moeconv.orbax.store import Folder

# A link that stays where the user pointed is as good as what it leads to.
STEP = Path("checkpoints/0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose chunks lie in files of their own, as they are: what a file holds is a weight."""
    run = tmp_path_factory.mktemp("made") / "run"
    synthetic.write(run, "mixtral", ocdbt=False, zarr3=False)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _open(run: Path) -> object:
    with planted.at_once():
        return open_checkpoint(str(run))


@planted.every()
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "checkpoints/0",
        "checkpoints/0/items",
        "checkpoints/0/items/_METADATA",
        "checkpoints/0/_CHECKPOINT_METADATA",
        "checkpoints/0/commit_success.txt",
        "checkpoints/0/items/params.params.token_embedder.embedding",
        "checkpoints/0/items/params.params.token_embedder.embedding/.zarray",
        "checkpoints/0/items/params.params.token_embedder.embedding/0.0",
        "checkpoints/0/items/of-nobody",
    ],
)
def test_nothing_leads_out_of_a_run(run, outside, name, plant):
    outside.plant(plant, run / name)
    with pytest.raises(NotACheckpointError):
        _open(run)
    assert outside.untouched()


@planted.every()
@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
def test_nor_of_an_ocdbt_store(tmp_path, outside, name, plant):
    items = synthetic.write(tmp_path / "run", "mixtral").items
    at = items / name
    if name == "d":
        at = sorted(at.iterdir())[0]
    outside.plant(plant, at)
    with pytest.raises(NotACheckpointError, match=r"is a link|FIFO|looked at"):
        _open(tmp_path / "run")


@planted.every()
def test_nor_do_files_beside_it(run, outside, plant):
    outside.plant(plant, run / "moeconv_run.json")
    with pytest.raises(ConfigError, match=r"moeconv_run\.json"):
        _open(run)


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/0", "checkpoints/0/items"])
def test_a_whole_step_elsewhere_is_named_by_its_own_path(run, tmp_path, what):
    """Also where its metadata lead back into the run."""
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run / what, elsewhere)
    (run / what).symlink_to(elsewhere)
    with pytest.raises(NotACheckpointError, match=f"leads out of {run}.* or name that"):
        _open(run)
    for inner in elsewhere.rglob("_METADATA"):
        kept = run / "kept"
        shutil.move(inner, kept)
        inner.symlink_to(kept)
    with pytest.raises(NotACheckpointError, match="leads out of"):
        _open(run)


def test_what_the_user_names_may_be_a_link(run, tmp_path):
    (tmp_path / "mine").symlink_to(run)
    (tmp_path / "items").symlink_to(run / STEP / "items")
    assert locate(str(tmp_path / "mine")).number == 0
    assert locate(str(tmp_path / "items")).items.local == run / STEP / "items"


def test_links_within_a_run_are_followed(run):
    shutil.move(run / STEP, run / "real")
    (run / STEP).symlink_to("../real")
    chunk = run / "real/items/params.params.token_embedder.embedding/0.0"
    shutil.move(chunk, run / "real/items/chunk")
    chunk.symlink_to("../chunk")
    step = locate(str(run))
    assert step.items.local == run / "real/items"
    assert _open(run) is not None


def test_a_snapshot_of_the_hub_s_cache_is_read(run, tmp_path):
    """Its files are links to blobs beside the snapshots."""
    repo = tmp_path / "hub" / "models--me--run"
    snapshot = shutil.copytree(run, repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for number, path in enumerate(p for p in sorted(snapshot.rglob("*")) if p.is_file()):
        shutil.move(path, repo / "blobs" / str(number))
        path.symlink_to(os.path.relpath(repo / "blobs" / str(number), path.parent))
    assert _open(snapshot) is not None


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/hostname"])
@pytest.mark.parametrize("url", ["", "http://127.0.0.1:9/run"])
def test_a_name_of_a_file_never_climbs(tmp_path, outside, url, name):
    folder = Folder.open(url or str(outside.folder / "sub"))
    with pytest.raises(NotACheckpointError, match="leads out of"):
        folder.read(name)


def test_the_files_that_an_ocdbt_store_names_lie_below_it(tmp_path, outside):
    """Its nodes name data files as they like; that tensorstore follows none out is not ours."""
    items = tmp_path / "items"
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{items}/"},
        "config": {"max_inline_value_bytes": 1, "compression": None},
    }
    length = len(planted.SECRET)
    store = ts.KvStore.open({**kvstore, "value_data_prefix": "0123456789a/"}).result()
    store.write(b"chunk", b"x" * length).result()
    assert ts.KvStore.open(kvstore).result().read(b"chunk").result().value == b"x" * length
    (data,) = (items / "0123456789a").iterdir()
    shutil.copy(outside.folder / "secret", outside.folder / data.name)
    for file in (items / "d").iterdir():
        node = file.read_bytes().replace(b"0123456789a/", b"../somebody/")
        file.write_bytes(node[:-4] + _crc32c(node[:-4]).to_bytes(4, "little"))
    assert b"../somebody/" in b"".join(file.read_bytes() for file in (items / "d").iterdir())
    with pytest.raises(ValueError, match="Invalid key"):
        ts.KvStore.open(kvstore).result().read(b"chunk").result()


def test_above_what_the_user_named_the_run_s_own_folder_is_the_limit(run, outside):
    """The sidecar lies beside the steps, above the items that were named."""
    step = locate(str(run / STEP / "items"))
    assert [folder.local for folder in step.beside] == [run / STEP, run / "checkpoints", run]
    outside.plant(planted.relative, run / "moeconv_run.json")
    with pytest.raises(NotACheckpointError, match=f"leads out of {run}"):
        step.beside[-1].read("moeconv_run.json")
