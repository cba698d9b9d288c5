"""Metadata that ask for more than a machine has are refused before anything is counted through."""

import json
import os
import resource
import shutil

import numpy as np
import orbax_writer
import pytest
import synthetic
from cli_runner import moeconv

from moeconv.arch.detection import detect_layout
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import (
    ConfigError,
    MemoryLimitError,
    MoeconvError,
    NotACheckpointError,
    TensorError,
    UnsupportedError,
)
from moeconv.families import blocks

MIB = 2**20
NAME = "token_embedder.embedding"


@pytest.fixture
def checkpoint(tmp_path):
    made = synthetic.write(tmp_path / "run", ocdbt=False, zarr3=False)
    made.config_file()
    return made


@pytest.fixture(autouse=True)
def bounded():
    """No test takes 2 GiB more than there is, whatever goes wrong."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2048 * MIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def rewrite(checkpoint, name=NAME, **changes):
    """Changes the metadata of one array."""
    path = checkpoint.items / f"params.params.{name}" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(checkpoint, tmp_path, error, match, **options):
    options = {"config": checkpoint.run / "config.yml", "max_memory": 512 * MIB, **options}
    with pytest.raises(error, match=match):
        convert(plan_conversion(str(checkpoint.run), ConvertOptions(**options)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def shapes(layers=4, **changes):
    made = {"L": layers, **synthetic.SIZES, **changes}
    axes = synthetic.parameter_axes("mixtral", layers=1, tied=True, scanned=True)
    return {tuple(n.split(".")): tuple(made[a] for a in letters) for n, letters in axes.items()}


@pytest.mark.parametrize("number", ["100000000000", "9" * 5000, "999999999", "٣", "01"])
def test_a_layer_of_any_number(number):
    axes = synthetic.parameter_axes("mixtral", layers=1, tied=True, scanned=False)
    found = {}
    for name, letters in axes.items():
        path = tuple(name.replace("layers_0", f"layers_{number}").split("."))
        found[path] = tuple(synthetic.SIZES[a] for a in letters)
    with pytest.raises(TensorError) as caught:
        detect_layout(found, [blocks()["mixtral"]])
    assert str(caught.value).count("\n") <= 21


@pytest.mark.parametrize(
    "sizes", [{"L": 10**10}, {"L": 10**5}, {"E": 10**9}, {"L": 1000, "E": 500}]
)
def test_more_layers_or_experts_than_models_have(sizes):
    with pytest.raises(TensorError, match="no model has more than"):
        detect_layout(shapes(**sizes), [blocks()["mixtral"]], scan_axis=1)


def test_as_many_experts_as_models_have():
    assert len(detect_layout(shapes(L=61, E=384), [blocks()["mixtral"]], scan_axis=1).kinds) == 61


@pytest.mark.parametrize("rows", [2**22, 2**32, 2**50])
def test_a_chunk_beyond_its_array_counts_as_it_is_decoded(checkpoint, tmp_path, rows):
    rewrite(checkpoint, chunks=[rows, 16])
    refused(checkpoint, tmp_path, (MemoryLimitError, NotACheckpointError), "chunk|cannot be opened")


@pytest.mark.parametrize("zarr3", [False, True])
def test_the_memory_of_a_chunk_beyond_its_array(tmp_path, zarr3):
    """The floor is what one needs: all that is decoded, though all but a corner is cut off."""
    wide = np.zeros((2**17, 16), np.float32)
    made = synthetic.write(
        tmp_path / "run", ocdbt=False, zarr3=zarr3, change=lambda a: a.update({NAME: wide})
    )
    made.config_file()
    path = made.items / f"params.params.{NAME}" / ("zarr.json" if zarr3 else ".zarray")
    content = json.loads(path.read_text())
    content["shape"] = [64, 16]
    path.write_text(json.dumps(content))
    plan = plan_conversion(str(made.run), ConvertOptions(config=made.run / "config.yml")).plan
    unit = next(u for u in plan.units if u.array.name == NAME)
    assert unit.nbytes == 64 * 16 * 4
    assert unit.decoded_bytes == wide.nbytes
    assert plan.estimate.memory_floor > 2 * wide.nbytes


def test_more_rows_than_there_is_memory(checkpoint, tmp_path):
    rewrite(checkpoint, shape=[2**40, 16], chunks=[2**40, 16])
    refused(checkpoint, tmp_path, MemoryLimitError, "--max-memory")


def test_more_chunks_than_runs_write(checkpoint, tmp_path):
    rewrite(checkpoint, shape=[2**40, 16], chunks=[64, 16])
    refused(checkpoint, tmp_path, TensorError, "chunks, of which no run writes more")


def test_a_shard_of_more_chunks_than_runs_write(tmp_path):
    made = synthetic.write(tmp_path / "run", ocdbt=False)
    made.config_file()
    path = made.items / f"params.params.{NAME}" / "zarr.json"
    content = json.loads(path.read_text())
    content["chunk_grid"]["configuration"]["chunk_shape"] = [2**25, 16]
    content["codecs"][0]["configuration"]["chunk_shape"] = [1, 16]
    path.write_text(json.dumps(content))
    refused(made, tmp_path, TensorError, "has shards of")


@pytest.mark.parametrize("shape", [[0, 16], [64, 0]])
def test_an_axis_without_entries(checkpoint, tmp_path, shape):
    rewrite(checkpoint, shape=shape)
    refused(checkpoint, tmp_path, TensorError, "holds nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [1] * 32, "chunks": [1] * 32},
        {"shape": [1] * 33, "chunks": [1] * 33},
        {"shape": [2**62, 2**62], "chunks": [2**62, 2**62]},
        {"shape": [-1, 16]},
        {"chunks": [0, 16]},
        {"shape": []},
        {"dtype": "|V1000000000"},
        {"dtype": [["x", "<f4"], ["y", "<f4"]]},
        {"dtype": "<f8"},
        {"dtype": "|S2147483647"},
        {"compressor": {"id": "unheard-of"}},
        {"filters": [{"id": "delta"}]},
        {"shape": None},
    ],
    ids=str,
)
def test_metadata_of_no_parameter(checkpoint, tmp_path, changes):
    rewrite(checkpoint, **changes)
    refused(checkpoint, tmp_path, MoeconvError, "token_embedder.embedding")


def test_a_codec_that_says_itself_how_much_it_takes(checkpoint, tmp_path):
    """A blosc chunk of some kB may be decompressed to 2 GiB, whatever shape it is to have."""
    rewrite(checkpoint, compressor={"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 0})
    refused(checkpoint, tmp_path, UnsupportedError, "compressed with blosc")


@pytest.mark.parametrize("codec", ["zstd", "gzip", "zlib", "bz2"])
def test_a_chunk_that_decompresses_to_more_than_its_shape(tmp_path, codec):
    """The others stop where the chunk ends."""
    wide = np.zeros((2**20, 16), np.float32)
    made = synthetic.write(tmp_path / "run", ocdbt=False, zarr3=False)
    made.config_file()
    compressor = {"id": codec, "level": 1}
    bomb = tmp_path / "bomb"
    meta = {**orbax_writer._zarr2(wide, [2**20, 16]), "compressor": compressor}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{bomb}/"}, "metadata": meta}
    orbax_writer.ts.open(spec, create=True).result().write(wide).result()
    rewrite(made, compressor=compressor)
    shutil.copy(bomb / "0.0", made.items / f"params.params.{NAME}" / "0.0")
    before = peak()
    refused(made, tmp_path, TensorError, "is damaged", max_memory=4096 * MIB)
    assert peak() - before < 32 * MIB


def peak() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def metadata(checkpoint, change):
    path = checkpoint.items / "_METADATA"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_million_leaves(checkpoint, tmp_path):
    entry = {"key_metadata": [{"key": "a"}], "value_metadata": {}}
    metadata(checkpoint, lambda c: c["tree_metadata"].update({str(n): entry for n in range(10**5)}))
    refused(checkpoint, tmp_path, NotACheckpointError, "names 1000[0-9]{2} arrays")


def test_metadata_of_any_size(checkpoint, tmp_path):
    with (checkpoint.items / "_METADATA").open("ab") as file:
        file.truncate(2**40)
    refused(checkpoint, tmp_path, NotACheckpointError, "is larger than 32 MiB")


@pytest.mark.parametrize("name", ["before_20240101", "4000_backup", "tmp.4001", "9" * 200, "٤٠٠١"])
def test_a_decoy_is_no_step(tmp_path, name):
    made = synthetic.write(tmp_path / "run", step=4000)
    made.config_file()
    shutil.copytree(made.step_dir, made.step_dir.with_name(name))
    ran = moeconv("inspect", made.run, "--config", made.run / "config.yml", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["step"] == 4000
    shutil.rmtree(made.step_dir)
    ran = moeconv("inspect", made.run, "--config", made.run / "config.yml")
    assert ran.code == NotACheckpointError.exit_code
    assert f"passed over: {name}" in ran.error


def test_a_padded_step_is_one(tmp_path):
    made = synthetic.write(tmp_path / "run", step=4000)
    made.config_file()
    made.step_dir.rename(made.step_dir.with_name("00004001"))
    ran = moeconv("inspect", made.run, "--config", made.run / "config.yml", "--json")
    assert json.loads(ran.out)["step"] == 4001


def test_paths_that_are_not_utf8(checkpoint, tmp_path):
    """Asked as a library, which no command line guards."""
    odd = tmp_path / os.fsdecode(b"r\xff")
    odd.mkdir()
    config = checkpoint.run / "config.yml"
    shutil.copy(config, odd / "config.yml")
    convert(plan_conversion(str(checkpoint.run), ConvertOptions(config=config)), odd / "out")
    json.loads((odd / "out" / "moeconv_manifest.json").read_bytes())
    shutil.copytree(checkpoint.run, odd / "run")
    with pytest.raises(NotACheckpointError, match="not UTF-8"):
        plan_conversion(str(odd / "run"), ConvertOptions(config=config))
    with pytest.raises(ConfigError, match="cannot stand in the manifest"):
        plan_conversion(str(checkpoint.run), ConvertOptions(config=odd / "config.yml"))
