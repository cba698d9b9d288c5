"""What a checkpoint holds is converted, known to be no part of the model, or refused by name."""

import json

import numpy as np
import pytest
import synthetic

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import MoeconvError, NotACheckpointError, TensorError, UnsupportedError

MOE = ("decoder", "layers", "MoeBlock_0")
LEAF = np.ones((4, 2), np.float32)
# What MaxText 0.2.5 writes beside the parameters of a train state (seen; with dropout too).
STATE = (
    ("step",),
    ("opt_state", "0", "count"),
    ("opt_state", "0", "mu", "params", *MOE, "gate", "kernel"),
    ("opt_state", "2", "count"),
    *(
        ("nnx_aux", "model", "decoder", *path, "rngs", stream, leaf)
        for path in ((), ("dropout",), ("layers", "MoeBlock_0"), ("layers_0", "mlp", "dropout"))
        for stream in ("params", "dropout", "aqt")
        for leaf in ("key", "count")
    ),
)


def converted(tmp_path, beside):
    made = synthetic.write(tmp_path / "run", beside=dict.fromkeys(beside, LEAF))
    options = ConvertOptions(config=made.config_file())
    return convert(plan_conversion(str(made.run), options), tmp_path / "out")


def test_the_state_of_a_training_is_left_alone(tmp_path):
    converted(tmp_path, STATE)


@pytest.mark.parametrize(
    "leaf",
    [
        ("params", "sparsity", *MOE, "mask"),
        ("params", "batch_stats", "decoder", "norm", "mean"),
        ("params", "decoder", "extra"),
        ("params", "params"),
        ("nnx_aux", "model", *MOE, "gate", "tid2eid"),
        ("nnx_aux", "model", *MOE, "gate", "rngs"),
        ("nnx_aux", "model", *MOE, "rngs", "params", "frequency"),
        ("nnx_aux", "model", *MOE, "key"),
        ("nnx_aux", "count"),
        ("batch_stats", "mean"),
        ("model", "decoder", "kernel"),
        ("lora", "decoder", "layers", "query", "kernel_lora_a"),
        ("opt_states", "0", "count"),
        ("rngs", "params", "seed"),
    ],
    ids=".".join,
)
def test_what_nobody_knows_is_refused_by_name(tmp_path, leaf):
    with pytest.raises(TensorError, match=rf"outside of params.params.*\n  {'.'.join(leaf)}$"):
        converted(tmp_path, (*STATE, leaf))


@pytest.mark.parametrize(
    "leaf",
    [
        ("params", "MoEBiasVar", "decoder", "layers", "mlp", "MoeBlock_0", "gate", "bias"),
        ("nnx_aux", "model", *MOE, "gate", "bias"),
    ],
    ids=".".join,
)
def test_the_bias_of_a_router_is_refused_as_such(tmp_path, leaf):
    with pytest.raises(UnsupportedError, match=rf"biases of a router.*\n  {'.'.join(leaf)}$"):
        converted(tmp_path, (*STATE, leaf))


def test_many_are_listed_shortly(tmp_path):
    with pytest.raises(TensorError, match="… and 30 more") as caught:
        converted(tmp_path, [("other", str(n)) for n in range(50)])
    assert str(caught.value).count("\n") == 21


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = synthetic.write(tmp_path_factory.mktemp("names") / "run")
    made.config_file()
    return made


@pytest.fixture
def opened(checkpoint):
    """Opens the checkpoint with one more leaf in its `_METADATA`."""
    path = checkpoint.items / "_METADATA"
    raw = path.read_text()

    def open_with(keys, **value):
        content = json.loads(raw)
        content["tree_metadata"]["?"] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, **value},
        }
        path.write_text(json.dumps(content))
        options = ConvertOptions(config=checkpoint.run / "config.yml")
        return plan_conversion(str(checkpoint.run), options)

    yield open_with
    path.write_text(raw)


@pytest.mark.parametrize(
    "key",
    ["../../x", "..", ".", "a/b", "/etc", "\0", "a\0", "\ud800", "", "x" * 5000, "\x1b[2J", "a\nb",
     None, True, 1.5, {}, ["a"]],
    ids=repr,
)  # fmt: skip
def test_a_name_that_no_leaf_has(opened, key):
    with pytest.raises(NotACheckpointError, match="is not the tree metadata"):
        opened(("params", "params", "decoder", key))


def test_a_leaf_that_is_not_there(opened):
    with pytest.raises(NotACheckpointError, match="cannot be opened"):
        opened(("params", "params", "decoder", "extra"))


def test_a_leaf_without_a_name(opened):
    with pytest.raises(NotACheckpointError, match="is not the tree metadata"):
        opened(())


def test_two_leaves_of_one_name(opened):
    """Dots join the keys, so that these would be one array, and one of them lost."""
    with pytest.raises(NotACheckpointError, match=r"decoder.decoder_norm.scale twice"):
        opened(("params", "params", "decoder", "decoder_norm.scale"))


def test_a_parameter_that_is_not_to_be_read(opened):
    """Only empty containers have no array."""
    with pytest.raises(MoeconvError, match="extra"):
        opened(("params", "params", "decoder", "extra"), skip_deserialize=True)
    opened(("params", "params", "decoder", "extra"), value_type="None", skip_deserialize=True)
