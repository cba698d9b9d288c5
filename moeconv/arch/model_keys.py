"""A model's description as MaxText's settings: for building it, and for the config of a run."""

from typing import Any

from moeconv.arch.blocks import Block, settings_of
from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout


def size_keys(model: ModelDescription, layout: Layout) -> dict[str, Any]:
    """What the shapes say, as MaxText's keys; they are as wide as the model is."""
    dense, moe = model.intermediate_size, model.moe_intermediate_size
    keys: dict[str, Any] = {
        "global_parameter_scale": 1,
        "base_emb_dim": model.hidden_size,
        "base_num_query_heads": model.num_attention_heads,
        "base_num_kv_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "base_num_decoder_layers": model.num_hidden_layers,
        "base_mlp_dim": dense or moe,
        "vocab_size": model.vocab_size,
        "logits_via_embedding": model.tie_word_embeddings,
        "max_target_length": model.max_position_embeddings,
        "decoder_block": model.decoder_block,
        "scan_layers": layout.stacking.scanned,
    }
    if layout.scan_axis is not None:
        keys["param_scan_axis"] = layout.scan_axis
    if model.num_experts:
        keys |= {"num_experts": model.num_experts, "base_moe_mlp_dim": moe}
    shown = layout.block.shown.items()
    keys |= {key: model.layer_kinds[0].attention == attention for key, attention in shown}
    shaped = {key: value(vars(model)) for key, value in layout.block.shapes.items()}
    keys |= {key: value for key, value in shaped.items() if value is not None}
    return {**keys, **layout.block.config(model, layout.cycle)}


def semantic_keys(model: ModelDescription, block: Block) -> dict[str, Any]:
    """What shapes do not determine, as the conversion understood it."""
    keys: dict[str, Any] = {
        "normalize_embedding_logits": model.normalize_embedding_logits,
        "rope_type": model.rope_type,
        "rope_max_timescale": model.rope_theta,
        "rope_use_scale": model.rope_use_scale,
        "normalization_layer_epsilon": model.rms_norm_eps,
    }
    if model.num_experts_per_tok:
        keys["num_experts_per_tok"] = model.num_experts_per_tok
    for spec in settings_of(block, vars(model)):
        keys[spec.key] = spec.write(model.settings[spec.name])
    return keys


def run_keys(model: ModelDescription, layout: Layout) -> dict[str, Any]:
    """All settings that a MaxText config needs, so that MaxText builds the model."""
    block = layout.block
    return {**demanded_keys(block), **size_keys(model, layout), **semantic_keys(model, block)}


def demanded_keys(block: Block) -> dict[str, Any]:
    """Settings that must have a certain value in a block, whatever the model's size."""
    first = {key: next(iter(values)) for key, values in block.demands.items()}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in first.items()}
