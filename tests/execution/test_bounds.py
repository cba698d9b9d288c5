"""The same bytes whatever jobs, memory and chunks are; each chunk once, within memory."""

import os
import subprocess
import sys

import cli_runner
import numpy as np
import pytest
import synthetic
import tensorstore as ts
from cli_runner import moeconv
from engine_lab import MIB, contents, options, tensors, to
from safetensors import safe_open

from moeconv.conversion.api import convert, plan_conversion
from moeconv.errors import MemoryLimitError
from moeconv.tensor import form


def test_jobs_and_memory_do_not_show(big, expected, tmp_path):
    prepared = plan_conversion(str(big.run), options(big))
    floor = prepared.plan.estimate.memory_floor
    for n, more in enumerate(({"jobs": 1}, {"jobs": 4}, {"jobs": 4, "max_memory": floor},
                              {"jobs": 1, "max_memory": 2 * floor})):  # fmt: skip
        to(big, tmp_path / f"out{n}", **more)
        assert contents(tmp_path / f"out{n}") == expected, more


@pytest.mark.parametrize("target", ["mixtral", "ernie4_5_moe"])
def test_sharded_arrays_give_the_same_tensors(tmp_path, small_units, target):
    """However the devices cut the arrays; the pieces of most cuts have to be spilled."""
    results, spilled = [], []
    for n, split in enumerate(({}, {"D": 4}, {"M": 3, "F": 2, "h": 2}, {"E": 2, "D": 3, "V": 5},
                               {"L": 2, "H": 2, "K": 2})):  # fmt: skip
        checkpoint = synthetic.write(tmp_path / f"run{n}", "envy", split=split)
        checkpoint.config_file()
        for jobs in (1, 3):
            prepared = plan_conversion(
                str(checkpoint.run), options(checkpoint, target=target, jobs=jobs)
            )
            convert(prepared, tmp_path / f"out{n}-{jobs}")
            results.append(tensors(tmp_path / f"out{n}-{jobs}"))
        spilled.append(len(prepared.plan.assemblies))
    assert all(result == results[0] for result in results)
    assert spilled[0] == 0
    assert max(spilled) >= 3


@pytest.mark.parametrize("kind", ["whole", "spilled"])
@pytest.mark.parametrize("storage", [{}, {"zarr3": False, "ocdbt": False}])
def test_every_chunk_is_read_once(tmp_path, monkeypatch, kind, storage):
    """Counted in the bytes that tensorstore fetches."""
    monkeypatch.setattr("moeconv.planning.units.UNIT_BYTES", 1)
    monkeypatch.setattr("moeconv.planning.slabs.BLOCK_BYTES", MIB)
    sizes = {"L": 2, "V": 8192, "D": 512, "M": 512, "F": 512, "h": 64}
    split = {"D": 2} if kind == "spilled" else {}
    checkpoint = synthetic.write(tmp_path / "run", sizes=sizes, split=split, **storage)
    checkpoint.config_file()
    prepared = plan_conversion(str(checkpoint.run), options(checkpoint))
    assert bool(prepared.plan.assemblies) == (kind == "spilled")
    files = [p for p in checkpoint.items.rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    stored = sum(p.stat().st_size for p in files)
    before = fetched()
    convert(prepared, tmp_path / "out")
    size, asked_again = (now - then for now, then in zip(fetched(), before, strict=True))
    # Metadata and indexes are a few kB an array; the smallest chunk counted here is 20 times that.
    assert stored <= size < stored + 200_000
    assert stored > 30_000_000
    assert asked_again == 0


def fetched() -> tuple[int, int]:
    """Bytes that were read, and questions whether a cached chunk is still the stored one."""
    metrics = ts.experimental_collect_matching_metrics
    read = [
        *metrics("/tensorstore/kvstore/file/bytes_read"),
        *metrics("/tensorstore/file/mmap_bytes"),
    ]
    [reads] = ts.experimental_collect_matching_metrics("/tensorstore/cache/kvs_cache_read")
    unchanged = [v["value"] for v in reads["values"] if v["category"] == "unchanged"]
    return sum(v["value"] for m in read for v in m["values"]), sum(unchanged)


MEASURED = """
import sys
from moeconv.cli.main import main
try:
    main()
finally:
    lines = open("/proc/self/status").read().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""


@pytest.mark.parametrize("split", [{"V": 16}, {"D": 16}], ids=["rows", "columns (spilled)"])
def test_peak_memory_stays_within_the_limit(tmp_path, split):
    """A 268 MB array in 16 chunks, with a limit at the floor and with two workers."""
    name, sizes = "token_embedder.embedding", {"L": 2, "V": 131_072, "D": 512}

    def quickly_packed(arrays):
        arrays[name][...] = np.resize(np.arange(1009, dtype=np.float32), arrays[name].shape)

    checkpoint = synthetic.write(tmp_path / "run", sizes=sizes, split=split, change=quickly_packed)
    config = checkpoint.config_file()
    plan = plan_conversion(str(checkpoint.run), options(checkpoint)).plan
    assert max(u.nbytes for u in plan.units) == 2**26
    assert bool(plan.assemblies) == ("D" in split)
    limit = -(-plan.estimate.memory_floor // MIB)
    assert limit < 300
    args = ["convert", checkpoint.run, tmp_path / "out", "--config", config, "--jobs", 2]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, args), "--max-memory", f"{limit}MiB"],
        capture_output=True, text=True, env=cli_runner.environment(), check=True,
    )  # fmt: skip
    peak = int(ran.stderr.split("VmHWM:")[1].split()[0]) * 1024
    assert peak <= limit * MIB
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        written = file.get_tensor("model.embed_tokens.weight")
    assert np.array_equal(written, checkpoint.arrays[name])


def test_memory_below_the_floor(big, tmp_path):
    floor = plan_conversion(str(big.run), options(big)).plan.estimate.memory_floor
    out, config = tmp_path / "out", ("--config", big.run / "config.yml")
    ran = moeconv("convert", big.run, out, *config, "--max-memory", floor - MIB)
    assert ran.code == MemoryLimitError.exit_code == 9
    number = -(-floor // MIB)
    assert f"give --max-memory {number}MiB or more" in ran.error
    assert os.listdir(tmp_path) == []
    assert moeconv("convert", big.run, out, *config, "--max-memory", f"{number}MiB").code == 0


def test_strips_of_any_width_transpose_alike(tiny, tmp_path, monkeypatch):
    to(tiny, tmp_path / "out")
    monkeypatch.setattr(form, "_STRIP", 5)
    to(tiny, tmp_path / "strips")
    assert contents(tmp_path / "strips") == contents(tmp_path / "out")
