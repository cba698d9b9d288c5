"""Checkpoints that older MaxText releases trained and saved, against the logits of those releases.

tests/fixtures/<name>/README.md says how each was made. The files are exactly as MaxText left them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_logits

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.orbax.metadata import read_tree
from moeconv.orbax.store import Folder

FIXTURES = Path(__file__).parents[1] / "fixtures"
# What `moeconv inspect` must say of each.
SAID = {
    "maxtext-0.1.0-mixtral": {
        "step": 3,
        "kind": "train state",
        "left_alone": ["opt_state", "step"],
        "layout": "scanned (layers stacked on axis 1)",
        "num_parameters": 8_400,
        "dtype": "float32",
        "tied": False,
        "moe_layers": [0, 1],
        "model_type": "mixtral",
    },
    # By that release's generate_param_only_checkpoint, force_unroll=true.
    "maxtext-0.1.0-llama2-params": {
        "step": 0,
        "kind": "parameters only",
        "left_alone": ["step"],
        "layout": "unscanned (one array a layer)",
        "num_parameters": 12_024,
        "dtype": "bfloat16",
        "tied": True,
        "moe_layers": [],
        "model_type": "llama",
    },
    "maxtext-0.2.2-mixtral-tied": {
        "step": 3,
        "kind": "train state",
        "left_alone": ["opt_state", "step"],
        "layout": "scanned (layers stacked on axis 1)",
        "num_parameters": 16_920,
        "dtype": "bfloat16",
        "tied": True,
        "moe_layers": [0, 1],
        "model_type": "mixtral",
    },
}


# The first release that has the block, for each page whose oldest release was run.
OLDEST = {
    "maxtext-0.1.0-qwen3": "qwen3",
    "maxtext-0.1.0-qwen3_moe": "qwen3_moe",
    "maxtext-0.1.0-mistral": "mistral",
    "maxtext-0.1.0-llama4": "llama4_text",
    "maxtext-0.2.1-qwen2": "qwen2",
}


@pytest.mark.parametrize("name", OLDEST)
def test_the_oldest_release_of_a_block(name, tmp_path):
    """The page says since when; what that release trained converts, and has its logits."""
    run_dir = shutil.copytree(FIXTURES / name, tmp_path / name)
    found = open_checkpoint(str(run_dir), config=run_dir / "config.yml")
    assert (found.as_dict()["missing"], found.as_dict()["refusals"]) == ([], [])
    assert found.layout.block.since == name.split("-")[1]
    options = ConvertOptions(config=run_dir / "config.yml", dtype="float32")
    convert(plan_conversion(str(run_dir), options), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == OLDEST[name]
    reference = np.load(run_dir / "reference.npz")
    assert_same_logits(tmp_path / "out", reference["tokens"], reference["logits"])


@pytest.fixture(params=SAID)
def run_dir(request, tmp_path) -> Path:
    return shutil.copytree(FIXTURES / request.param, tmp_path / request.param)


def test_inspected(run_dir):
    said = SAID[run_dir.name]
    report = open_checkpoint(str(run_dir), config=run_dir / "config.yml").as_dict()
    for key in ("step", "kind", "left_alone", "layout", "num_parameters"):
        assert report[key] == said[key]
    assert report["format"] == "OCDBT + zarr3"
    assert {parameter["dtype"] for parameter in report["parameters"]} == {said["dtype"]}
    assert report["fields"]["tie_word_embeddings"]["value"] is said["tied"]
    assert report["fields"]["moe_layers"]["value"] == said["moe_layers"]
    assert report["missing"] == report["refusals"] == report["warnings"] == []


def test_without_a_config_only_shapes_are_known(run_dir):
    report = open_checkpoint(str(run_dir)).as_dict()
    assert "decoder_block" in report["missing"]
    assert report["fields"]["num_hidden_layers"]["value"] == 2


def test_converted(run_dir, tmp_path):
    options = ConvertOptions(config=run_dir / "config.yml", dtype="float32")
    manifest = convert(plan_conversion(str(run_dir), options), tmp_path / "out")
    assert manifest.source.step == SAID[run_dir.name]["step"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == SAID[run_dir.name]["model_type"]
    reference = np.load(run_dir / "reference.npz")
    assert_same_logits(tmp_path / "out", reference["tokens"], reference["logits"])


def test_the_fixtures_are_what_differs_from_now():
    """_METADATA of 0.1.0 says nothing of OCDBT; its `opt_state: {}` is an entry without array."""
    items = {name: next((FIXTURES / name).glob("checkpoints/*/items")) for name in SAID}
    stored = {n: json.loads((path / "_METADATA").read_text()) for n, path in items.items()}
    assert {n for n, content in stored.items() if "use_ocdbt" not in content} == {
        "maxtext-0.1.0-mixtral",
        "maxtext-0.1.0-llama2-params",
    }
    assert "('opt_state',)" in stored["maxtext-0.1.0-llama2-params"]["tree_metadata"]
    tree = read_tree(Folder.open(str(items["maxtext-0.1.0-llama2-params"])))
    assert tree.use_ocdbt
    assert ("opt_state",) not in tree.leaves
    steps = [json.loads((p.parent / "_CHECKPOINT_METADATA").read_text()) for p in items.values()]
    assert all(not step["custom_metadata"] for step in steps)  # scan_layers is not recorded yet
