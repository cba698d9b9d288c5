"""Which of MaxText's settings a decoder block reads, found by watching.

MaxText builds the model and traces its forward pass, both as shapes only, from a config that notes
each key that is read. What is computed depends on the keys read and on no other: Python takes the
same path whatever the rest says. Config post-processing has ended by then, so its reads are not
among them.

    python tests/arch/keys_lab.py   writes keys_read.json anew
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.families import blocks

_DATA = Path(__file__).parents[2] / "moeconv" / "arch" / "data"
KEYS_READ = _DATA / "keys_read.json"
CLASSES = _DATA / "maxtext_keys.json"

# Small, and of one CPU device; no key here changes what a model computes but by its size.
_BASE: Mapping[str, object] = {
    "override_model_config": True,
    "hardware": "cpu",
    "ici_fsdp_parallelism": 1,
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "log_config": False,
    "per_device_batch_size": 1,
    "attention": "dot_product",
    "megablox": False,
    "base_emb_dim": 16,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_mlp_dim": 32,
    "base_num_decoder_layers": 2,
    "vocab_size": 64,
    "max_target_length": 16,
}
_MOE: Mapping[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 32}
_GELU: Mapping[str, object] = {"mlp_activations": ["gelu", "linear"]}
_FOUR_NORMS: Mapping[str, object] = {
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 4,
    "attn_logits_soft_cap": 50.0,
    "final_logits_soft_cap": 30.0,
}
# A block with the settings that it is used with.
BLOCKS: Mapping[str, Mapping[str, object]] = {
    "llama2": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True},
    "mixtral": _MOE,
    "envy": {
        **_MOE,
        "use_qk_norm": True,
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 2,
    },
    "qwen3_moe": {**_MOE, "use_qk_norm": True, "norm_topk_prob": True},
    "gpt_oss": {
        **_MOE,
        "sliding_window_size": 4,
        "attention_bias": True,
        "attention_sink": True,
        "mlp_bias": True,
        "routed_bias": True,
        "mlp_activations": ["sigmoid", "linear"],
        "mlp_activations_limit": 7.0,
        "inhomogeneous_layer_cycle_interval": 2,
    },
    "olmo3": {
        "model_name": "olmo3-7b",
        "use_qk_norm": True,
        "sliding_window_size": 4,
        "inhomogeneous_layer_cycle_interval": 2,
        "rope_type": "default",
    },
    "llama4": {
        **_MOE,
        "num_experts_per_tok": 1,
        "shared_experts": 1,
        "use_qk_norm": True,
        "nope_layer_interval": 2,
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 2,
        "temperature_tuning": True,
        "chunk_attn_window_size": 8,
    },
    "gemma4": {
        **_MOE,
        "model_name": "gemma4-26b",
        "base_num_decoder_layers": 8,
        "global_head_dim": 16,
        "share_kv_projections": True,
        "v_norm_with_scale": False,
        "shared_experts": 1,
        "norm_topk_prob": True,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "mlp_activations": ["gelu", "linear"],
        "sliding_window_size": 4,
    },
    "gemma4_small": {
        **_GELU,
        "model_name": "gemma4-e2b",
        "base_num_decoder_layers": 10,
        "base_num_kv_heads": 1,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "v_norm_with_scale": False,
        "sliding_window_size": 4,
    },
    "gpt3": {
        "base_num_kv_heads": 4,
        "head_dim": 4,
        "mlp_activations": ["gelu"],
        "trainable_position_size": 32,
        "fused_qkv": True,
    },
    "gemma": _GELU,
    "gemma2": {**_GELU, **_FOUR_NORMS},
    "gemma3": {**_GELU, **_FOUR_NORMS, "model_name": "gemma3-4b", "base_num_decoder_layers": 7},
    "deepseek": {
        **_MOE,
        "model_name": "deepseek3-671b",
        "base_num_kv_heads": 4,
        "base_num_decoder_layers": 3,
        "first_num_dense_layers": 1,
        "attention_type": "mla",
        "q_lora_rank": 6,
        "kv_lora_rank": 5,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
        "shared_experts": 1,
        "routed_score_func": "sigmoid",
        "routed_bias": True,
        "n_routing_groups": 2,
        "topk_routing_group": 1,
        "use_indexer": True,
        "indexer_n_heads": 2,
        "indexer_head_dim": 4,
        "indexer_topk": 8,
    },
    "qwen3_next": {
        **_MOE,
        "base_num_decoder_layers": 3,
        "shared_experts": 1,
        "norm_topk_prob": True,
        "inhomogeneous_layer_cycle_interval": 2,
        "gdn_num_key_heads": 2,
        "gdn_key_head_dim": 4,
        "gdn_num_value_heads": 2,
        "gdn_value_head_dim": 4,
        "partial_rotary_factor": 0.5,
    },
    "qwen3_5": {
        **_MOE,
        "shared_experts": 1,
        "norm_topk_prob": True,
        "inhomogeneous_layer_cycle_interval": 2,
        "gdn_num_key_heads": 2,
        "gdn_key_head_dim": 4,
        "gdn_num_value_heads": 2,
        "gdn_value_head_dim": 4,
        "use_mrope": True,
        "mrope_section": [2, 1, 1],
    },
}
# Variants that MaxText does not build: it drops no token of GPT-OSS (configs/types.py), and to drop
# those of Llama 4 its code has no weights (layers/moe.py `dense_matmul`).
_NONE_OF: Mapping[str, frozenset[str]] = {
    "gpt_oss": frozenset({"capacity_factor"}),
    "llama4": frozenset({"capacity_factor"}),
}
# How the layers are stacked, the head, RoPE, and the kernels of the experts: all open paths that
# read further keys. Four devices are those of tests/conftest.py.
_VARIANTS: tuple[Mapping[str, object], ...] = (
    {"scan_layers": True, "sparse_matmul": False},
    {"scan_layers": False, "sparse_matmul": False, "logits_via_embedding": True},
    {"scan_layers": False, "sparse_matmul": True, "rope_type": "llama3.1"},
    {"sparse_matmul": False, "capacity_factor": 1.0},
    {"sparse_matmul": True, "ici_expert_parallelism": 2},
    {"sparse_matmul": True, "ici_expert_parallelism": 2, "use_ring_of_experts": True,
     "megablox": True},
)  # fmt: skip
_YARN: Mapping[str, object] = {"rope_type": "yarn", "sparse_matmul": False}

# Not read in what is traced, but what they do is done around it, or under sharding rules that are
# not observed (layers/moe.py `get_ragged_buffer_factor`).
_AROUND = frozenset(
    {
        "checkpoint_is_quantized",
        "enable_lora",
        "eval_ragged_buffer_factor",
        "learn_to_init_mode",
        "lora",
        "student_overrides",
        "training_objective",
    }
)


class Watched:
    """A MaxText config that notes which of its keys are read."""

    def __init__(self, config: Any, read: set[str]) -> None:
        self._config = config
        self._read = read

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        value = getattr(self._config, key)
        if callable(value):  # get_keys() would read all of them unseen
            raise NotImplementedError(f"a layer calls config.{key}")
        self._read.add(key)
        return value

    def __deepcopy__(self, memo: Any) -> "Watched":
        return self


def function_keys_read(block: str) -> list[str]:
    """The keys that decide a decoder block's function: those that MaxText reads, and `_AROUND`."""
    classes = json.loads(CLASSES.read_text())
    none = _NONE_OF.get(block, frozenset())
    variants = [variant for variant in _VARIANTS if not none & variant.keys()]
    if "yarn" in blocks()[block].ropes:
        variants.append(_YARN)
    read = _AROUND.union(*(_read(block, variant) for variant in variants))
    return sorted(key for key in read if classes[key]["class"] == "function")


def resolved(**keys: object) -> Any:
    """MaxText's config of these keys over base.yml."""
    from maxtext.configs import pyconfig

    base = Path(pyconfig.__file__).with_name("base.yml")
    return pyconfig.initialize(["", str(base)], **{**_BASE, **keys})


def _read(block: str, variant: Mapping[str, object]) -> set[str]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.utils import maxtext_utils, model_creation_utils

    given = {**BLOCKS[block], **variant, "decoder_block": block}
    if not any(way.scanned for way in blocks()[block].stackings):
        given["scan_layers"] = False
    config = resolved(**given)
    devices = jax.devices("cpu")[: config.ici_expert_parallelism]
    mesh = maxtext_utils.get_mesh_from_config(config, devices)
    read: set[str] = set()
    _, model = model_creation_utils.create_nnx_abstract_model(Watched(config, read), mesh)
    graph, state = nnx.split(model)

    def forward(state: Any, tokens: Any) -> Any:
        return nnx.merge(graph, state)(
            decoder_input_tokens=tokens,
            decoder_positions=tokens,
            decoder_segment_ids=tokens,
            enable_dropout=False,
        )

    tokens = jax.ShapeDtypeStruct((1, config.max_target_length), jnp.int32)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        jax.eval_shape(forward, state, tokens)
    return read


def main() -> None:
    """Writes keys_read.json."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    read = {block: function_keys_read(block) for block in BLOCKS}
    KEYS_READ.write_text(json.dumps(read, indent=1) + "\n")
    print(f"wrote {KEYS_READ}")


if __name__ == "__main__":
    main()
