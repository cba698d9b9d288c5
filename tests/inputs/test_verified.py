"""MaxText's own forward pass over inputs that its loader of parameters does not take."""

import shutil

import numpy as np
import orbax_writer
import pytest
import yaml
from checkpoints.mixtral import MIXTRAL
from cli_runner import moeconv
from inputs_lab import as_leaf

from moeconv.verification.models.maxtext import MaxTextModel

TOKENS = np.arange(24).reshape(2, 12)
INPUTS = {
    "NNX state": {"item": "model_params", "rename": as_leaf(value=True)},
    "RL": {"rename": as_leaf("base", value=True)},
    "list indices": {"rename": as_leaf("params", "params", listed=True)},
    "never merged": {"parts": 2},
    "another item": {"item": "state"},
    "encoder": {"beside": {("params", "params", "vision_encoder", "x"): np.ones(2, np.float32)}},
    "the step itself": {"item": ""},
}


@pytest.fixture(scope="module")
def plain(maxtext_lab):
    return maxtext_lab.checkpoint(MIXTRAL, {"scan_layers": False})


@pytest.fixture(scope="module")
def expected(plain):
    return MaxTextModel.load(plain.items, plain.config).logits(TOKENS)


@pytest.mark.parametrize("kind", INPUTS)
def test_logits_are_those_of_the_model(plain, expected, tmp_path, kind):
    paths = {tuple(name.split(".")): value for name, value in plain.params.items()}
    step = orbax_writer.write(tmp_path / "3", paths, scan_layers=False, **INPUTS[kind])
    items = step / INPUTS[kind].get("item", "items")
    found = MaxTextModel.load(items, plain.config).logits(TOKENS)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["NNX state", "never merged"])
def test_verified(plain, tmp_path, kind):
    """All levels."""
    paths = {tuple(name.split(".")): value for name, value in plain.params.items()}
    step = orbax_writer.write(tmp_path / "3", paths, scan_layers=False, **INPUTS[kind])
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(dict(plain.config)))
    assert moeconv("convert", step, tmp_path / "out", "--config", config).code == 0
    ran = moeconv("verify", tmp_path / "out", "--config", config)
    assert ran.code == 0, ran.err + ran.out
    shutil.rmtree(tmp_path / "out")
