"""MaxText's forward on lab checkpoints against dense float64 numpy and against transformers."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
from maxtext_lab import ENVY, LLAMA2, MIXTRAL, TIED

from moeconv.errors import (
    ConfigError,
    NotACheckpointError,
    TensorError,
    UnsupportedError,
    UsageError,
)
from moeconv.verify.hf_model import hf_logits
from moeconv.verify.maxtext import MaxTextModel
from moeconv.verify.metrics import compare_logits as compare_positions


def compare_logits(reference, candidate):
    """The summary of all positions, by attribute."""
    return SimpleNamespace(**compare_positions(reference, candidate).summary())


TOKENS = np.random.default_rng(7).integers(0, 160, (2, 24), dtype=np.int32)
# fp32 against float64 on logits of std 1; a mistake in the mathematics is 0.1 and more.
EXACT = 1e-5


# --- an independent computation ---------------------------------------------------------------


def dense_logits(params, config, tokens, *, rounded_head=False):
    """The model in float64, from the stored parameters; shares no code with MaxText."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    heads, kv = config["base_num_query_heads"], config["base_num_kv_heads"]
    head, depth = config["head_dim"], config["base_num_decoder_layers"]
    interleaved = config["decoder_block"] == "envy"
    scanned, axis = config.get("scan_layers", True), config.get("param_scan_axis", 1)
    x = p["token_embedder.embedding"][tokens]
    _, length, width = x.shape
    half = np.arange(head // 2) * 2 / head
    angle = np.arange(length)[:, None] / config["rope_max_timescale"] ** half
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x, scale):
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + config["normalization_layer_epsilon"]) * scale

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def silu(x):
        return x / (1 + np.exp(-x))

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    for layer in range(depth):

        def of(name, layer=layer):
            if not scanned:
                return p[f"decoder.layers_{layer}.{name}"]
            if interleaved:
                return p[f"decoder.layers.layers_{layer % 2}.{name}"].take(layer // 2, axis)
            return p[f"decoder.layers.{name}"].take(layer, axis)

        y = norm(x, of("pre_self_attention_layer_norm.scale"))
        q = rotate(np.einsum("btd,dhk->bthk", y, of("self_attention.query.kernel")))
        k = rotate(np.einsum("btd,dhk->bthk", y, of("self_attention.key.kernel")))
        v = np.einsum("btd,dhk->bthk", y, of("self_attention.value.kernel"))
        k, v = (np.repeat(part, heads // kv, axis=2) for part in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k)
        if interleaved:
            scores /= np.sqrt(head)
        scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
        mixed = np.einsum("bhts,bshk->bthk", softmax(scores), v)
        x = x + np.einsum("bthk,hkd->btd", mixed, of("self_attention.out.kernel"))
        y = norm(x, of("post_self_attention_layer_norm.scale"))
        if config["num_experts"] == 1 or (interleaved and layer % 2 == 0):
            gate, up, down = (of(f"mlp.{name}.kernel") for name in ("wi_0", "wi_1", "wo"))
            x = x + (silu(y @ gate) * (y @ up)) @ down
            continue
        gate, up, down = (of(f"MoeBlock_0.{name}") for name in ("wi_0", "wi_1", "wo"))
        route = y @ of("MoeBlock_0.gate.kernel")
        worst = np.sort(route, -1)[..., [-config["num_experts_per_tok"]]]
        weight = softmax(np.where(route >= worst, route, -np.inf))
        every = silu(np.einsum("btd,edf->btef", y, gate)) * np.einsum("btd,edf->btef", y, up)
        x = x + np.einsum("bte,btef,efd->btd", weight, every, down, optimize=True)
    x = norm(x, p["decoder.decoder_norm.scale"])
    if not config.get("logits_via_embedding"):
        return x @ p["decoder.logits_dense.kernel"]
    table = params["token_embedder.embedding"]
    if rounded_head:
        table = table.astype("bfloat16")
    scale = np.sqrt(width) if config.get("normalize_embedding_logits", True) else 1.0
    return x @ table.astype(np.float64).T / scale


def distance(a, b):
    return float(np.abs(np.asarray(a, np.float64) - b).max())


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
    model = MaxTextModel.load(checkpoint.items, checkpoint.config)
    stock, unrounded = model.logits(TOKENS), model.logits(TOKENS, head="unrounded")
    assert stock.dtype == np.float32
    assert stock.shape == (2, 24, 160)
    expected = dense_logits(checkpoint.params, checkpoint.config, TOKENS)
    assert 0.5 < expected.std() < 2.0
    assert distance(unrounded, expected) < EXACT
    rounded = dense_logits(checkpoint.params, checkpoint.config, TOKENS, rounded_head=True)
    assert distance(stock, rounded) < EXACT
    if checkpoint.config.get("logits_via_embedding"):
        assert distance(stock, unrounded) > 1e-3
    else:
        np.testing.assert_array_equal(stock, unrounded)


def test_the_heads_do_not_depend_on_the_order_of_asking(maxtext_lab):
    checkpoint = maxtext_lab.checkpoint(ENVY, TIED)
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


@pytest.mark.parametrize(
    "block",
    [pytest.param(MIXTRAL, id="mixtral", marks=pytest.mark.slow), pytest.param(ENVY, id="envy")],
)
@pytest.mark.parametrize("stored", STORED)
def test_one_model_however_it_is_stored(maxtext_lab, block, stored):
    reference = maxtext_lab.checkpoint(block)
    overrides, full_state = STORED[stored]
    checkpoint = maxtext_lab.checkpoint(block, *overrides, full_state=full_state, step=3)
    storage = json.loads((checkpoint.items / "_METADATA").read_text())
    assert storage["use_ocdbt"] == checkpoint.config.get("checkpoint_storage_use_ocdbt", True)
    assert storage["use_zarr3"] == checkpoint.config.get("checkpoint_storage_use_zarr3", True)
    assert any("opt_state" in key for key in storage["tree_metadata"]) == full_state
    assert checkpoint.step_dir.name == "3"
    logits = MaxTextModel.load(checkpoint.items, checkpoint.config).logits(TOKENS)
    assert distance(logits, dense_logits(reference.params, reference.config, TOKENS)) < EXACT


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float16"])
def test_weights_are_computed_with_as_stored(maxtext_lab, weight_dtype):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL, {"weight_dtype": weight_dtype}, full_state=True)
    assert {value.dtype.name for value in checkpoint.params.values()} == {weight_dtype}
    logits = MaxTextModel.load(checkpoint.items, checkpoint.config).logits(TOKENS)
    assert distance(logits, dense_logits(checkpoint.params, checkpoint.config, TOKENS)) < EXACT


def test_shards_are_chunks_on_disk(maxtext_lab):
    shapes = {}
    for name, overrides in (("one", {}), ("four", {"ici_fsdp_parallelism": 4})):
        checkpoint = maxtext_lab.checkpoint(MIXTRAL, overrides, full_state=True)
        array = open_array(checkpoint.items, "token_embedder.embedding")
        shapes[name] = (array.shape, array.chunk_layout.write_chunk.shape)
    assert shapes["one"] == ((160, 48), (160, 48))
    assert shapes["four"] == ((160, 48), (160, 12))


# --- the weights are the checkpoint's ---------------------------------------------------------


def open_array(items, name):
    import tensorstore as ts

    store = {"driver": "ocdbt", "base": f"file://{items}", "path": f"params.params.{name}/"}
    return ts.open({"driver": "zarr3", "kvstore": store}, open=True).result()


@pytest.mark.parametrize(
    "name",
    [
        "token_embedder.embedding",
        "decoder.decoder_norm.scale",
        "decoder.layers.layers_0.mlp.wi_1.kernel",
        "decoder.layers.layers_1.MoeBlock_0.gate.kernel",
        "decoder.layers.layers_1.self_attention.key.kernel",
    ],
)
def test_a_change_on_disk_is_a_change_of_the_logits(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(ENVY, full_state=True)
    step = shutil.copytree(checkpoint.step_dir, tmp_path / checkpoint.step_dir.name)
    array = open_array(step / "items", name)
    changed = array.read().result()[::-1].copy()
    array.write(changed).result()
    logits = MaxTextModel.load(step / "items", checkpoint.config).logits(TOKENS)
    assert distance(logits, dense_logits(checkpoint.params, checkpoint.config, TOKENS)) > 0.1
    expected = dense_logits({**checkpoint.params, name: changed}, checkpoint.config, TOKENS)
    assert distance(logits, expected) < EXACT


def test_another_seed_is_another_model(maxtext_lab):
    first, second = (maxtext_lab.checkpoint(MIXTRAL, seed=seed) for seed in (0, 1))
    logits = [MaxTextModel.load(c.items, c.config).logits(TOKENS) for c in (first, second)]
    assert distance(*logits) > 1.0


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
    checkpoint = maxtext_lab.checkpoint(MIXTRAL, layout)
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
    expected = MaxTextModel.load(checkpoint.items, checkpoint.config).logits(TOKENS)
    for config in (checkpoint.resolved, {**sidecar, "of_another_release": 1}):
        logits = MaxTextModel.load(checkpoint.items, config).logits(TOKENS)
        np.testing.assert_array_equal(logits, expected)


# --- what cannot be evaluated is an error -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scan_layers": False}, TensorError, "layers_0/MoeBlock_0"),
        ({"base_emb_dim": 64}, TensorError, "decoder_norm/scale"),
        ({"logits_via_embedding": True}, TensorError, r"decoder\.logits_dense\.kernel"),
        ({"decoder_block": "mixtrl"}, ConfigError, "decoder_block"),
        ({"emb_dim": 64}, ConfigError, "emb_dim: 64 given, 48 derived"),
        ({"quantization": "int8"}, UnsupportedError, "int8"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(maxtext_lab, change, error, message):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    with pytest.raises(error, match=message):
        MaxTextModel.load(checkpoint.items, {**checkpoint.config, **change})


def test_not_a_checkpoint(maxtext_lab, tmp_path):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    for path in (tmp_path / "absent", tmp_path, checkpoint.step_dir):
        with pytest.raises(NotACheckpointError, match="_METADATA"):
            MaxTextModel.load(path, checkpoint.config)


@pytest.mark.parametrize("tokens", [[[0, 160]], [[-1, 0]], [0, 1], [[0.0, 1.0]]])
def test_bad_tokens_are_refused(maxtext_lab, tokens):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    model = MaxTextModel.load(checkpoint.items, checkpoint.config)
    with pytest.raises(UsageError, match="Tokens"):
        model.logits(np.array(tokens))


def test_a_moved_seam_is_an_error(maxtext_lab, monkeypatch):
    from maxtext.layers import embeddings, nnx_decoders

    checkpoint = maxtext_lab.checkpoint(MIXTRAL, TIED)
    stock = embeddings.attend_on_embedding

    def attend_on_embedding(*args):
        return stock(*args)

    for modules in ((embeddings,), (nnx_decoders,), (embeddings, nnx_decoders)):
        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, "attend_on_embedding", attend_on_embedding)
            model = MaxTextModel.load(checkpoint.items, checkpoint.config)
            with pytest.raises(UnsupportedError, match="rounding to bfloat16"):
                model.logits(TOKENS, head="unrounded")
            model.logits(TOKENS)
    # A decoder that does not pass by the seam at all.
    with monkeypatch.context() as patch:
        patch.setattr(
            nnx_decoders.NNXDecoder,
            "apply_output_head",
            lambda self, shared_embedding, y, *_: y @ shared_embedding.embedding[...].T,
        )
        model = MaxTextModel.load(checkpoint.items, checkpoint.config)
        with pytest.raises(UnsupportedError, match="rounding to bfloat16"):
            model.logits(TOKENS, head="unrounded")
    assert nnx_decoders.attend_on_embedding is stock


@pytest.mark.slow
def test_leaves_no_trace(maxtext_lab, tmp_path):
    """In a bare process: nothing printed, nothing written, XLA_FLAGS as it was."""
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    script = f"""
        import numpy, os
        from moeconv.verify.maxtext import MaxTextModel
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


# --- transformers -----------------------------------------------------------------------------


@pytest.fixture
def hf_mixtral(maxtext_lab, tmp_path):
    """The untied mixtral of the lab, written out by hand."""
    from safetensors.numpy import save_file

    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    config, p = checkpoint.config, checkpoint.params
    tensors = {
        "model.embed_tokens.weight": p["token_embedder.embedding"],
        "model.norm.weight": p["decoder.decoder_norm.scale"],
        "lm_head.weight": p["decoder.logits_dense.kernel"].T,
    }
    width = config["base_emb_dim"]
    for layer in range(config["base_num_decoder_layers"]):
        of = {
            name.removeprefix("decoder.layers."): value.take(layer, 1)
            for name, value in p.items()
            if name.startswith("decoder.layers.")
        }
        to = f"model.layers.{layer}."
        query = of["self_attention.query.kernel"] * np.float32(np.sqrt(config["head_dim"]))
        tensors |= {
            f"{to}input_layernorm.weight": of["pre_self_attention_layer_norm.scale"],
            f"{to}post_attention_layernorm.weight": of["post_self_attention_layer_norm.scale"],
            f"{to}self_attn.q_proj.weight": query.reshape(width, -1).T,
            f"{to}self_attn.k_proj.weight": of["self_attention.key.kernel"].reshape(width, -1).T,
            f"{to}self_attn.v_proj.weight": of["self_attention.value.kernel"].reshape(width, -1).T,
            f"{to}self_attn.o_proj.weight": of["self_attention.out.kernel"].reshape(-1, width).T,
            f"{to}block_sparse_moe.gate.weight": of["MoeBlock_0.gate.kernel"].T,
        }
        for expert in range(config["num_experts"]):
            for theirs, ours in (("w1", "wi_0"), ("w3", "wi_1"), ("w2", "wo")):
                name = f"{to}block_sparse_moe.experts.{expert}.{theirs}.weight"
                tensors[name] = of[f"MoeBlock_0.{ours}"][expert].T
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    described = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": width,
        "intermediate_size": config["base_moe_mlp_dim"],
        "num_hidden_layers": config["base_num_decoder_layers"],
        "num_attention_heads": config["base_num_query_heads"],
        "num_key_value_heads": config["base_num_kv_heads"],
        "head_dim": config["head_dim"],
        "num_local_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "vocab_size": config["vocab_size"],
        "rope_theta": float(config["rope_max_timescale"]),
        "rms_norm_eps": config["normalization_layer_epsilon"],
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    return checkpoint, tmp_path, tensors


def test_transformers_agrees(hf_mixtral):
    pytest.importorskip("transformers")
    checkpoint, directory, _ = hf_mixtral
    logits = MaxTextModel.load(checkpoint.items, checkpoint.config).logits(TOKENS)
    difference = compare_logits(logits, hf_logits(directory, TOKENS))
    assert difference.max_abs < EXACT
    assert difference.top1_agreement == 1.0
    half = hf_logits(directory, TOKENS, dtype="bfloat16")
    assert half.dtype == np.float32
    assert compare_logits(logits, half).max_abs > 1e-3


def test_a_tied_model_needs_no_head(hf_mixtral):
    from safetensors.numpy import save_file

    checkpoint, directory, tensors = hf_mixtral
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tied = {**checkpoint.config, **TIED, "normalize_embedding_logits": False}
    expected = dense_logits(checkpoint.params, tied, TOKENS)
    assert distance(hf_logits(directory, TOKENS), expected) < 10 * EXACT  # logits of std 7


def test_a_partial_model_is_refused(hf_mixtral):
    from safetensors.numpy import save_file

    _, directory, tensors = hf_mixtral
    file = directory / "model.safetensors"
    lacking = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(lacking, file, {"format": "pt"})
    with pytest.raises(TensorError, match=r"missing_keys: lm_head\.weight"):
        hf_logits(directory, TOKENS)
    save_file(tensors | {"model.extra.weight": np.zeros(3, np.float32)}, file, {"format": "pt"})
    with pytest.raises(TensorError, match=r"unexpected_keys: model\.extra\.weight"):
        hf_logits(directory, TOKENS)
    file.write_bytes(b"")
    with pytest.raises(TensorError, match=r"cannot load"):
        hf_logits(directory, TOKENS)
    file.unlink()
    with pytest.raises(TensorError, match="safetensors"):
        hf_logits(directory, TOKENS)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        hf_logits(directory, TOKENS)


# --- the comparison ---------------------------------------------------------------------------


def test_compare_logits_measures():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((70, 50)).astype(np.float32) + 1000
    same = compare_logits(reference, reference)
    assert (same.max_abs, same.kl_max, same.top1_agreement, same.top5_agreement) == (0, 0, 1, 1)
    variance = reference.astype(np.float64).var(axis=-1).mean()
    assert same.std_reference == pytest.approx(np.sqrt(variance), rel=1e-9)
    # An offset of all logits changes them, but no probability.
    shifted = compare_logits(reference, reference + 1)
    assert shifted.max_abs == pytest.approx(1) == shifted.mean_abs
    assert shifted.kl_max < 1e-12
    opposite = compare_logits(reference, -reference)
    assert opposite.top1_agreement < 0.2
    assert opposite.kl_mean > 1


def test_compare_logits_by_hand():
    reference = np.log([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])
    candidate = np.log([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    result = compare_logits(reference, candidate)
    assert result.kl_max == pytest.approx(0.25 * np.log(2))
    assert result.kl_mean == pytest.approx(0.125 * np.log(2))
    assert result.max_abs == pytest.approx(np.log(2))
    assert result.top1_agreement == 0.5
    assert result.top5_agreement == 1.0
    moved = compare_logits(np.arange(10.0)[None], np.roll(np.arange(10.0), 2)[None])
    assert moved.top5_agreement == pytest.approx(0.6)


def test_compare_logits_refuses():
    with pytest.raises(UsageError, match="shape"):
        compare_logits(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(TensorError, match="candidate"):
        compare_logits(np.zeros((1, 3)), np.array([[0, np.nan, 0]]))
