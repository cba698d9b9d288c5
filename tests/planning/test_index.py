"""What serves needs of the files: the index's counts, and a size that the Hub takes."""

import json
import math

import synthetic
from cli_runner import moeconv
from safetensors import safe_open

from moeconv.errors import UsageError


def test_the_index_counts_parameters(tmp_path):
    made = synthetic.write(tmp_path / "run", "mixtral")
    out = tmp_path / "out"
    options = ("--config", made.config_file(), "--max-shard-size", "20kB")
    assert moeconv("convert", made.run, out, *options).code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    count = 0
    for name in set(index["weight_map"].values()):
        with safe_open(out / name, "np") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_parameters"] == count
    assert index["metadata"]["total_size"] == 4 * count


def test_a_file_above_the_hubs_limit_is_refused_before_the_work(tmp_path):
    for size, refused in (("50GB", False), ("51GB", True), ("300GB", True)):
        ran = moeconv("convert", "no-run", tmp_path / "out", "--max-shard-size", size)
        said = "the Hub takes up to 50 GB" in ran.err
        assert said == refused
        if refused:
            assert ran.code == UsageError.exit_code
