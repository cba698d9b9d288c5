"""MaxText's forward on lab checkpoints against dense float64 numpy."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from checkpoints.envy import ENVY
from checkpoints.llama import LLAMA2
from checkpoints.mixtral import MIXTRAL
from checkpoints.row import TIED
from dense import EXACT, TOKENS, dense_logits, distance
from helpers import reference, tokens_for

from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.models.maxtext_config import build_config

# Where one layer shows it: what compiles faster.
ONE_LAYER = {"base_num_decoder_layers": 1}

# --- the forward is right ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([MIXTRAL], id="mixtral"),
        pytest.param([MIXTRAL, TIED, {"head_dim": 32, "scan_layers": False}], id="mixtral-tied"),
        pytest.param([ENVY, TIED], id="envy-tied"),
        pytest.param([LLAMA2, TIED, {"normalize_embedding_logits": False}], id="llama2-tied"),
    ],
)
def test_forward_is_what_the_parameters_compute(maxtext_lab, overrides):
    checkpoint = maxtext_lab.checkpoint(*overrides)
    tokens, unrounded = tokens_for(checkpoint), reference(checkpoint)
    stock = MaxTextModel.load(checkpoint.items, checkpoint.config).logits(tokens)
    assert stock.dtype == np.float32
    assert stock.shape == (2, 64, 160)
    expected = dense_logits(checkpoint.params, checkpoint.config, tokens)
    assert 0.5 < expected.std() < 2.0
    assert distance(unrounded, expected) < EXACT
    rounded = dense_logits(checkpoint.params, checkpoint.config, tokens, rounded_head=True)
    assert distance(stock, rounded) < EXACT
    if checkpoint.config.get("logits_via_embedding"):
        assert distance(stock, unrounded) > 1e-3
    else:
        np.testing.assert_array_equal(stock, unrounded)


def test_the_heads_do_not_depend_on_the_order_of_asking(maxtext_lab):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL, TIED, ONE_LAYER)
    model = MaxTextModel.load(checkpoint.items, checkpoint.config)
    unrounded, stock = model.logits(TOKENS, head="unrounded"), model.logits(TOKENS)
    assert distance(stock, unrounded) > 1e-3
    longer = np.concatenate([TOKENS, TOKENS], axis=1)  # traced again
    np.testing.assert_allclose(
        model.logits(longer, head="unrounded")[:, :24], unrounded, atol=EXACT, rtol=0
    )


STORED = {
    "full state": ([], True),
    "unscanned": ([{"scan_layers": False}], False),
    "unscanned full state": ([{"scan_layers": False}], True),
    "scan axis 0": ([{"param_scan_axis": 0}], True),
    "zarr2": ([{"checkpoint_storage_use_zarr3": False}], True),
    "no ocdbt": (
        [{"checkpoint_storage_use_ocdbt": False, "checkpoint_storage_use_zarr3": False}],
        True,
    ),
    "fsdp 4": ([{"ici_fsdp_parallelism": 4}], True),
    "expert 2 tensor 2": ([{"ici_expert_parallelism": 2, "ici_tensor_parallelism": 2}], False),
}
EVERY_TIME = [(ENVY, "unscanned full state"), (ENVY, "expert 2 tensor 2")]


@pytest.mark.parametrize(
    ("block", "stored"),
    [
        # The others of these are in test_matrix.py, where their bits are compared.
        pytest.param(
            block,
            name,
            id=f"{block['decoder_block']}-{name}",
            marks=marks,
        )
        for block in (MIXTRAL, ENVY)
        for name in STORED
        for marks in [() if (block, name) in EVERY_TIME else pytest.mark.proof("storage")]
    ],
)
def test_one_model_however_it_is_stored(maxtext_lab, block, stored):
    one = maxtext_lab.checkpoint(block)
    overrides, full_state = STORED[stored]
    checkpoint = maxtext_lab.checkpoint(block, *overrides, full_state=full_state, step=3)
    storage = json.loads((checkpoint.items / "_METADATA").read_text())
    assert storage["use_ocdbt"] == checkpoint.config.get("checkpoint_storage_use_ocdbt", True)
    assert storage["use_zarr3"] == checkpoint.config.get("checkpoint_storage_use_zarr3", True)
    assert any("opt_state" in key for key in storage["tree_metadata"]) == full_state
    assert checkpoint.step_dir.name == "3"
    logits = MaxTextModel.load(checkpoint.items, checkpoint.config).logits(TOKENS)
    assert distance(logits, dense_logits(one.params, one.config, TOKENS)) < EXACT


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float16"])
def test_weights_are_computed_with_as_stored(maxtext_lab, weight_dtype):
    keys = {"weight_dtype": weight_dtype, "base_emb_dim": 64}  # of test_matrix.py
    checkpoint = maxtext_lab.checkpoint(MIXTRAL, TIED, keys)
    assert {value.dtype.name for value in checkpoint.params.values()} == {weight_dtype}
    expected = dense_logits(checkpoint.params, checkpoint.config, tokens_for(checkpoint))
    assert distance(reference(checkpoint), expected) < EXACT


def test_shards_are_chunks_on_disk(maxtext_lab):
    shapes = {}
    for name, overrides in (("one", {}), ("four", {"ici_fsdp_parallelism": 4})):
        checkpoint = maxtext_lab.checkpoint(MIXTRAL, TIED, overrides)
        array = open_array(checkpoint.items, "token_embedder.embedding")
        shapes[name] = (array.shape, array.chunk_layout.write_chunk.shape)
    assert shapes["one"] == ((160, 48), (160, 48))
    assert shapes["four"] == ((160, 48), (160, 12))


# --- the weights are the checkpoint's ---------------------------------------------------------


def open_array(items, name):
    import tensorstore as ts

    store = {"driver": "ocdbt", "base": f"file://{items}", "path": f"params.params.{name}/"}
    return ts.open({"driver": "zarr3", "kvstore": store}, open=True).result()


# One of every place in the tree.
CHANGED = (
    "token_embedder.embedding",
    "decoder.decoder_norm.scale",
    "decoder.layers.layers_0.mlp.wi_1.kernel",
    "decoder.layers.layers_1.MoeBlock_0.gate.kernel",
    "decoder.layers.layers_1.self_attention.key.kernel",
)


def test_a_change_on_disk_is_a_change_of_the_logits(maxtext_lab, tmp_path):
    """All at once: to the logits each alone is more than all that is allowed."""
    checkpoint = maxtext_lab.checkpoint(ENVY, TIED, full_state=True, step=3)
    step = shutil.copytree(checkpoint.step_dir, tmp_path / checkpoint.step_dir.name)
    params, config = dict(checkpoint.params), checkpoint.config
    for name in CHANGED:
        array = open_array(step / "items", name)
        changed = array.read().result()[::-1].copy()
        array.write(changed).result()
        alone = dense_logits({**checkpoint.params, name: changed}, config, TOKENS)
        assert distance(alone, dense_logits(checkpoint.params, config, TOKENS)) > 0.1
        params[name] = changed
    logits = MaxTextModel.load(step / "items", config).logits(TOKENS, head="unrounded")
    assert distance(logits, dense_logits(params, config, TOKENS)) < EXACT


def test_another_seed_is_another_model(maxtext_lab):
    made = (maxtext_lab.checkpoint(MIXTRAL, seed=seed) for seed in (0, 1))
    assert distance(*(dense_logits(c.params, c.config, TOKENS) for c in made)) > 1.0


# --- the config decides -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_max_timescale", 10_000),
        ("num_experts_per_tok", 1),
        ("capacity_factor", 0.5),
        ("normalization_layer_epsilon", 0.1),
        # the same shapes with the query scale of the other kind of block
        ("decoder_block", "envy"),
    ],
)
def test_a_wrong_config_shows(maxtext_lab, key, value):
    layout = {"scan_layers": False, "interleave_moe_layer_step": 1}
    layout |= {"inhomogeneous_layer_cycle_interval": 1, "use_post_ffw_norm": False}
    checkpoint = maxtext_lab.checkpoint(MIXTRAL, layout, ONE_LAYER)
    right = dense_logits(checkpoint.params, checkpoint.config, TOKENS)
    wrong = MaxTextModel.load(checkpoint.items, {**checkpoint.config, key: value}).logits(TOKENS)
    assert distance(right, wrong) > 0.1


@pytest.mark.parametrize("block", [MIXTRAL, ENVY, LLAMA2], ids=["mixtral", "envy", "llama2"])
def test_resolved_config_is_accepted(maxtext_lab, block):
    checkpoint = maxtext_lab.checkpoint(
        block, TIED, {"ici_fsdp_parallelism": 4, "dtype": "float16"}, full_state=True
    )
    assert len(checkpoint.resolved) > 800
    sidecar = json.loads(json.dumps(checkpoint.resolved, default=str))
    expected = build_config(checkpoint.config, "float32").get_keys()
    for config in (checkpoint.resolved, {**sidecar, "of_another_release": 1}):
        assert build_config(config, "float32").get_keys() == expected


@pytest.mark.slow
def test_leaves_no_trace(maxtext_lab, tmp_path):
    """In a bare process: nothing printed, nothing written, XLA_FLAGS as it was."""
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    script = f"""
        import numpy, os
        from moeconv.verification.models.maxtext import MaxTextModel
        config = {dict(checkpoint.config)!r}
        model = MaxTextModel.load({str(checkpoint.items)!r}, config)
        assert model.logits(numpy.zeros((1, 4), int)).std() > 0.1
        assert "XLA_FLAGS" not in os.environ
    """
    bare = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=bare | {"HOME": str(tmp_path), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
