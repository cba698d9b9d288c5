"""One layer at a time is the whole, for architectures of any shape: what a page's Probe can say."""

import numpy as np
import pytest

from moeconv.mapping.rules import Probe
from moeconv.verification.models import transformers as hf
from moeconv.verification.models.run_layers import run_layers
from moeconv.verification.models.transformers_parts import router_of

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def _deepseek_scores(mlp, output):
    return output[0].sigmoid() + mlp.gate.e_score_correction_bias


def _deepseek_alone(config, n, is_moe):
    config.first_k_dense_replace = 0 if is_moe else 1


def _llama4_alone(config, n, is_moe):
    config.no_rope_layers = config.no_rope_layers[n : n + 1]
    config.moe_layers = [0] if is_moe else []


# Class of the config, its settings beside `SIZES`, where its parts are.
MODELS = {
    "soft caps, two kinds of attention": (
        "Gemma2Config",
        {"num_hidden_layers": 3, "sliding_window": 4, "final_logit_softcapping": 0.5},
        Probe(),
    ),
    "a router by another name, two kinds of attention": (
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        Probe(router="router"),
    ),
    "dense layers first, scores with a bias": (
        "DeepseekV3Config",
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 8,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "head_dim": 4,
        },
        Probe(scores=_deepseek_scores, alone=_deepseek_alone),
    ),
    "two modules of attention, of which a layer has one": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 6,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        Probe(attention=("linear_attn", "self_attn")),
    ),
    "a router that gives its logits second": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "attention_chunk_size": 8,
        },
        Probe(
            mlp=("feed_forward",),
            router="router",
            scores=lambda mlp, output: output[1],
            alone=_llama4_alone,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_layer_at_a_time_is_the_whole(name, tmp_path, monkeypatch):
    import torch
    import transformers

    kind, settings, probe = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for tensor in model.state_dict().values():  # biases and sinks begin as zeros
        tensor += 0.1 * torch.rand_like(tensor)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(hf, "probe_of", lambda config: probe)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 24))
    whole = hf.HfModel.load(tmp_path)
    logits, routers = whole.run(tokens)
    layers = hf.HfLayers(tmp_path)
    output = run_layers(layers, tokens)
    found = layers.logits(layers.norm(output.hidden))
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    moe = [n for n, layer in enumerate(whole._model.model.layers) if router_of(layer, probe)]
    assert sorted(routers) == sorted(output.routers) == moe
    for n, scores in routers.items():
        assert scores.shape == (2, 24, settings.get("num_local_experts", 8))
        assert np.isfinite(scores).all() and scores.std() > 0
        assert np.abs(output.routers[n] - scores).max() <= 1e-5
