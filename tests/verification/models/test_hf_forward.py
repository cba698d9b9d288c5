"""transformers' forward on the same weights, and the comparison of logits."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints.mixtral import MIXTRAL
from checkpoints.row import TIED
from dense import EXACT, TOKENS, dense_logits, distance
from helpers import reference, tokens_for

from moeconv.errors import ConfigError, TensorError, UsageError
from moeconv.verification.measure.metrics import compare_logits as compare_positions
from moeconv.verification.models.transformers import hf_logits


def compare_logits(reference, candidate):
    """The summary of all positions, by attribute."""
    return SimpleNamespace(**compare_positions(reference, candidate).summary())


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
    logits, tokens = reference(checkpoint), tokens_for(checkpoint)
    difference = compare_logits(logits, hf_logits(directory, tokens))
    assert difference.max_abs < EXACT
    assert difference.top1_agreement == 1.0
    half = hf_logits(directory, tokens, dtype="bfloat16")
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
    with pytest.raises(TensorError, match="the reference's logits"):
        compare_logits(np.array([[0, np.nan, 0]]), np.zeros((1, 3)))
