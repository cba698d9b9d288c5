"""The models that are measured, and small ones that test the bench itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

REFERENCE: Mapping[str, Any] = {
    "base_emb_dim": 768,
    "base_num_query_heads": 12,
    "base_num_kv_heads": 12,
    "head_dim": 64,
    "base_mlp_dim": 3072,
    "base_moe_mlp_dim": 3072,
    "base_num_decoder_layers": 6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128256,
    "max_target_length": 2048,
    "logits_via_embedding": True,
}
INTERLEAVED: Mapping[str, Any] = {
    "decoder_block": "envy",
    "interleave_moe_layer_step": 2,
    "inhomogeneous_layer_cycle_interval": 2,
    "use_qk_norm": False,
    "use_post_ffw_norm": False,
}
ALL_MOE: Mapping[str, Any] = {"decoder_block": "mixtral"}
# One chunk an array and layer: with more layers there are more chunks, none is larger.
NARROW: Mapping[str, Any] = {
    **REFERENCE,
    **ALL_MOE,
    "base_emb_dim": 512,
    "base_num_query_heads": 8,
    "base_num_kv_heads": 8,
    "base_mlp_dim": 1024,
    "base_moe_mlp_dim": 1024,
    "vocab_size": 32000,
    "scan_layers": False,
}
TINY: Mapping[str, Any] = {
    "base_emb_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 16,
    "base_mlp_dim": 128,
    "base_moe_mlp_dim": 128,
    "base_num_decoder_layers": 2,
    "num_experts": 4,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to convert."""

    title: str
    overrides: Mapping[str, Any]
    full_state: bool = False
    exporter: bool = False  # MaxText's exporter has a mapping for it
    streamed: bool = False  # written chunk by chunk, since it is larger than memory

    def tiny(self) -> "Model":
        """The same in a fraction of a second, to test the bench itself."""
        overrides = {**self.overrides, **TINY}
        return Model(f"{self.title}, tiny", overrides, self.full_state, self.exporter)

    def with_experts(self, count: int) -> "Model":
        """With so many of its experts only."""
        title = f"{self.title}, {count} of its {self.overrides['num_experts']} experts"
        return replace(self, title=title, overrides={**self.overrides, "num_experts": count})

    def is_of(self, whole: "Model") -> bool:
        """True if it is that model, with all or some of its experts."""
        return self.title.startswith(whole.title)

    def layers(self, count: int) -> "Model":
        return Model(f"{count} layers", {**self.overrides, "base_num_decoder_layers": count})


MODELS = (
    Model("reference, interleaved, train state", {**REFERENCE, **INTERLEAVED}, full_state=True),
    Model("all-MoE, parameters only", {**REFERENCE, **ALL_MOE}, exporter=True),
)
GROWING = Model("growing", NARROW)
# One layer as large as Mixtral 8x7B's, in the 16 bits that it is stored in.
LARGE = Model(
    "one layer of Mixtral 8x7B",
    {
        **ALL_MOE,
        "base_emb_dim": 4096,
        "base_num_query_heads": 32,
        "base_num_kv_heads": 8,
        "head_dim": 128,
        "base_mlp_dim": 14336,
        "base_moe_mlp_dim": 14336,
        "base_num_decoder_layers": 1,
        "num_experts": 8,
        "vocab_size": 1024,
        "max_target_length": 256,
        "weight_dtype": "bfloat16",
    },
)
# One layer as in MaxText's configs/models/*.yml, but for vocabulary and context. The experts
# of DeepSeek-V3's are 11.3 billion parameters, 22.5 GB as they are stored and 45 GB in float32.
_ONE_LAYER: Mapping[str, Any] = {
    "base_num_decoder_layers": 1,
    "scan_layers": False,
    "override_model_config": True,
    "vocab_size": 1024,
    "max_target_length": 256,
    "normalization_layer_epsilon": 1e-6,
    "num_experts_per_tok": 8,
}
QWEN3_235B = Model(
    "one layer of Qwen3-235B-A22B",
    {
        **_ONE_LAYER,
        "decoder_block": "qwen3_moe",
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "base_emb_dim": 4096,
        "base_num_query_heads": 64,
        "base_num_kv_heads": 4,
        "head_dim": 128,
        "base_moe_mlp_dim": 1536,
        "num_experts": 128,
        "rope_max_timescale": 5_000_000,
    },
    streamed=True,
)
DEEPSEEK_V3 = Model(
    "one layer of DeepSeek-V3",
    {
        **_ONE_LAYER,
        "decoder_block": "deepseek",
        "model_name": "deepseek3-671b",
        "attention_type": "mla",
        "first_num_dense_layers": 0,
        "base_emb_dim": 7168,
        "base_num_query_heads": 128,
        "base_num_kv_heads": 128,
        "base_mlp_dim": 18432,
        "base_moe_mlp_dim": 2048,
        "num_experts": 256,
        "shared_experts": 1,
        "routed_bias": True,
        "routed_score_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "n_routing_groups": 8,
        "topk_routing_group": 4,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "mscale": 1.0,
        "rope_type": "yarn",
        "rope_max_timescale": 10_000,
        "max_position_embeddings": 163_840,
        "original_max_position_embeddings": 4096,
        "rope_factor": 40,
        "beta_fast": 32,
    },
    streamed=True,
)
