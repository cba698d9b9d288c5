"""Small Hugging Face models of every architecture that a page has, written by transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BASE: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
}
_EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4,
    "beta_slow": 1,
    "original_max_position_embeddings": 32,
}
_MLA: Mapping[str, Any] = {
    "head_dim": 4,  # what is rotated, whatever the rest of a head has
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}

# Class of the config, and what differs from `_BASE`.
CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-3.1": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": True}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 3,
            "linear_conv_kernel_dim": 3,
        },
    ),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 6,
            "sliding_window": 16,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
            "moe_layers": None,
            "no_rope_layers": None,
        },
    ),
    "olmo3": ("Olmo3Config", {"sliding_window": 16}),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, "n_group": 2, "topk_group": 1}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_MLA,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_layer_interval": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_num_shared_experts": 0,
        },
    ),
}


def write(folder: Path, name: str, *, dtype: str = "bfloat16", **changes: Any) -> Path:
    """A model with random weights, norms and biases, as `save_pretrained` writes it.

    Args:
        folder: Where it goes.
        name: Of `CONFIGS`.
        dtype: Of its weights.
        changes: Of its config.
    """
    import torch
    import transformers

    kind, own = CONFIGS[name]
    config = getattr(transformers, kind)(**{**_BASE, **own, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        values = torch.randn_like(parameter)
        values = 1 + 0.3 * values if parameter.ndim == 1 else 0.1 * values
        parameter.data = torch.zeros_like(values) if "moe_statics" in key else values
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
