"""The trees in which MaxText keeps a model: each converts to the bytes of the usual one."""

import nnx_lab
import numpy as np
import pytest
import synthetic
import yaml
from checkpoints.envy import ENVY
from checkpoints.mixtral import MIXTRAL
from checkpoints.row import TIED
from cli_runner import moeconv
from engine_lab import tensors
from inputs_lab import as_leaf, converted

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import NotACheckpointError, TensorError, UnsupportedError
from moeconv.maxtext.checkpoint import open_checkpoint

ONES = np.ones(3, np.float32)
STREAMS = [
    ("rngs", "params", "key"),
    ("decoder", "layers", "MoeBlock_0", "rngs", "dropout", "count"),
    ("decoder", "dropout", "to_nnx__rngs", "aqt", "key"),
]
ROOTS = {
    "params.params": (("params", "params"), {}),
    "params": (("params",), {}),
    "base": (("base",), {"value": True}),
    "model": (("model",), {"value": True}),
    "top": ((), {"value": True}),
    "top without value": ((), {}),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Tensors of both layouts: the arrays of an unscanned model have other names, so values."""
    folder = tmp_path_factory.mktemp("usual")
    return {
        scanned: converted(
            synthetic.write(folder / f"run{scanned}", scanned=scanned), folder / f"out{scanned}"
        )[0]
        for scanned in (True, False)
    }


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("listed", [True, False], ids=["indices", "names"])
@pytest.mark.parametrize("root", ROOTS)
def test_a_tree(tmp_path, usual, root, listed, scanned):
    root, options = ROOTS[root]
    rename = as_leaf(*root, listed=listed, **options)
    made = synthetic.write(tmp_path / "run", scanned=scanned, rename=rename)
    found, opened = converted(made, tmp_path / "out")
    assert found == usual[scanned]
    assert opened.tree.root == root


@pytest.mark.parametrize("root", [("base",), ("model",), ()], ids=".".join)
def test_random_state_and_optimizers_are_left_alone(tmp_path, usual, root):
    beside = {(*root, *path, "value"): ONES for path in STREAMS}
    beside |= {
        ("optimizer", "opt_state", "0", "mu", "decoder", "x", "value"): ONES,
        ("optimizer", "step", "value"): ONES,
        ("opt_state", "acc_grads", "decoder", "layers", "mlp", "wi_0", "kernel"): ONES,
        ("opt_state", "mini_step"): ONES,
    }
    made = synthetic.write(tmp_path / "run", rename=as_leaf(*root, value=True), beside=beside)
    found, opened = converted(made, tmp_path / "out")
    assert found == usual[True]
    assert opened.tree.is_train_state
    assert {"opt_state", "optimizer"} <= set(opened.tree.others)


def test_of_diloco_the_outer_model_is_taken(tmp_path, usual):
    """Its replicas' states are of the training, but for variables that no parameter is."""
    inner = {
        ("inner_state", "params", "params", "decoder", "decoder_norm", "scale"): ONES,
        ("inner_state", "opt_state", "0", "count"): ONES,
        ("inner_state", "nnx_aux", "model", "decoder", "rngs", "params", "key"): ONES,
        ("outer_opt_state", "0", "trace", "decoder", "x"): ONES,
    }
    made = synthetic.write(tmp_path / "run", beside=inner)
    assert converted(made, tmp_path / "out")[0] == usual[True]
    bias = ("inner_state", "nnx_aux", "model", "decoder", "layers", "gate", "bias")
    made = synthetic.write(tmp_path / "biased", beside={**inner, bias: ONES})
    with pytest.raises(TensorError, match=r"outside of params.params.*\n  inner_state.*gate.bias$"):
        open_checkpoint(str(made.run), config=made.config_file())


@pytest.mark.parametrize("root", [("base",), ("model",), ()], ids=".".join)
def test_what_no_block_has_is_named(tmp_path, root):
    extra = (*root, "decoder", "layers", "MoeBlock_0", "gate", "statistics", "value")
    made = synthetic.write(
        tmp_path / "run", rename=as_leaf(*root, value=True), beside={extra: np.ones((4, 4))}
    )
    config = made.config_file()
    with pytest.raises((TensorError, UnsupportedError), match=r"MoeBlock_0.gate.statistics"):
        open_checkpoint(str(made.run), config=config)


@pytest.mark.parametrize("beside", [("reference", "decoder", "x"), ("decoder", "x"), ("ema", "x")])
def test_a_second_model_is_named(tmp_path, beside):
    made = synthetic.write(
        tmp_path / "run", rename=as_leaf("base", value=True), beside={beside: ONES}
    )
    with pytest.raises(TensorError, match=rf"outside of base .*\n  {'.'.join(beside)}$"):
        open_checkpoint(str(made.run), config=made.config_file())


def test_one_parameter_under_two_names(tmp_path):
    two = ("params", "params", "decoder", "layers", "3", "norm")
    made = synthetic.write(
        tmp_path / "run", beside={two: ONES, (*two[:3], "layers_3", "norm"): ONES}
    )
    with pytest.raises(NotACheckpointError, match=r"one parameter as .*layers.3.* and .*layers_3"):
        open_checkpoint(str(made.run), config=made.config_file())


def test_something_else_s_tree(tmp_path):
    made = synthetic.write(tmp_path / "run", rename=lambda path: ("actor", *path))
    with pytest.raises(NotACheckpointError, match=r"a model below actor, where no MaxText saves"):
        open_checkpoint(str(made.run))
    made = synthetic.write(tmp_path / "other", rename=lambda path: ("x", *path[1:]))
    with pytest.raises(NotACheckpointError, match=r"no parameters of a MaxText model \(it holds x"):
        open_checkpoint(str(made.run))


@pytest.mark.parametrize("module", ["vision_encoder", "mtp_block", "audio_encoder"])
def test_what_the_text_model_does_not_use_is_left_out_by_name(tmp_path, usual, module):
    """Whatever the tree, and whatever the config says of it."""
    path = (module, "layers_0", "mlp", "kernel")
    said = {
        "vision_encoder": {"use_multimodal": True, "vision_output_length": 4},
        "audio_encoder": {"use_audio": True},
        "mtp_block": {"mtp_num_layers": 1},
    }
    for n, rename in enumerate([as_leaf("params", "params"), as_leaf(value=True)]):
        made = synthetic.write(
            tmp_path / f"run{n}", rename=rename, beside={rename(path): np.ones((3, 2), np.float32)}
        )
        config = made.config_file(tmp_path, **said[module])
        found, opened = converted(made, tmp_path / f"out{n}", config=config)
        assert found == usual[True]
        [(name, why)] = opened.dropped.items()
        assert name == ".".join(path)
        assert "MaxText" in why


def test_stages_of_a_pipeline_are_named(tmp_path):
    def rename(path):
        return ("params", "params", *(("decoder", "pipeline_module") if path[1] == "layers" else
                                      path[:1]), *path[1:])  # fmt: skip

    made = synthetic.write(tmp_path / "run", rename=rename)
    with pytest.raises(UnsupportedError, match=r"as stages of pipeline parallelism"):
        open_checkpoint(str(made.run), config=made.config_file())


def test_inspect_says_that_integers_without_scales_are_not_converted(tmp_path):
    def change(arrays):
        name = "decoder.layers.MoeBlock_0.wi_0"
        arrays[name] = arrays[name].astype(np.int8)

    made = synthetic.write(tmp_path / "run", change=change)
    ran = moeconv("inspect", made.run, "--config", made.config_file())
    assert ran.code == 0
    assert "wi_0 is stored as int8" in ran.out
    assert "nothing is missing" not in ran.out


@pytest.mark.parametrize("overrides", [{}, {"scan_layers": False}], ids=["scanned", "unscanned"])
def test_what_the_training_engine_saves(maxtext_lab, tmp_path, overrides):
    """MaxText's own model, by its handlers, beside the same model as its trainer saves it."""
    lab = maxtext_lab.checkpoint(MIXTRAL, overrides)
    step = nnx_lab.write(tmp_path / "run", {**MIXTRAL, **overrides})
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(dict(lab.config)))
    for name, spec in (("engine", step), ("trainer", lab.run_dir)):
        prepared = plan_conversion(str(spec), ConvertOptions(config=config))
        convert(prepared, tmp_path / name)
    assert tensors(tmp_path / "engine") == tensors(tmp_path / "trainer")
    assert open_checkpoint(str(step), config=config).step.number == 10


def test_a_train_state_with_nnx_aux(maxtext_lab, tmp_path):
    """As MaxText's trainer saves it: random streams in `nnx_aux` are no part of the model."""
    state = maxtext_lab.checkpoint(ENVY, TIED, full_state=True)
    alone = maxtext_lab.checkpoint(ENVY, TIED)
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(dict(state.config)))
    for name, lab in (("state", state), ("alone", alone)):
        prepared = plan_conversion(str(lab.run_dir), ConvertOptions(config=config))
        convert(prepared, tmp_path / name)
    assert tensors(tmp_path / "state") == tensors(tmp_path / "alone")
    opened = open_checkpoint(str(state.run_dir), config=config)
    assert {"nnx_aux", "opt_state", "step"} <= set(opened.tree.others)
