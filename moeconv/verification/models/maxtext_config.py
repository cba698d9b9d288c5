"""MaxText's resolved config for evaluating a model: one CPU device, exact products, no files."""

import contextlib
import enum
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import ConfigError, UnsupportedError

# The groups of MaxText's config (classes of maxtext.configs.types) that say what is computed ...
_MODEL_GROUPS = (
    "ModelArchitecture",
    "Engram",
    "MTP",
    "LogitsAndLoss",
    "Attention",
    "MlaAttention",
    "MoBa",
    "CompressedAttention",
    "AttentionIndexer",
    "Llama4Attention",
    "DeepSeekMoE",
    "Qwen3Next",
    "ManifoldConstrainedHyperConnections",
    "PositionalEmbedding",
    "Rope",
    "YarnRope",
)
# ... with the members that say how fast, and on what, which stay at MaxText's defaults ...
_MACHINE_KEYS = frozenset(
    {
        "attention",
        "use_ragged_attention",
        "ragged_block_size",
        "use_tokamax_splash",
        "use_jax_splash",
        "force_q_layout",
        "use_qk_clip",
        "num_vocab_tiling",
        "vocab_tiling_ag_once",
        "defer_small_all_reduces",
        "log_moe_bias_norms",
        "log_step_diagnostics",
        "use_batch_split_schedule",
        "batch_split_factor",
        "use_lineage",
        "routed_bias_update_rate",
        "use_mhc_pallas_kernel",
    }
)
# ... and the members of mixed groups that belong to the model.
_MODEL_KEYS = frozenset(
    {
        "model_name",
        "vocab_size",
        "scan_layers",
        "param_scan_axis",
        "inhomogeneous_layer_cycle_interval",
        "max_target_length",
        "num_experts",
        "num_experts_per_tok",
        "capacity_factor",
        "base_moe_mlp_dim",
        "padded_base_moe_mlp_dim",
        "moe_expert_input_dim",
        "interleave_moe_layer_step",
        "norm_topk_prob",
        "float32_weight_sum",
        "float32_gate_logits",
        "prefuse_moe_weights",
        "fuse_expert_scales",
    }
)
# Derived by MaxText from base_* and global_parameter_scale; if given, they must come out the same.
_DERIVED_DIMENSIONS = (
    "emb_dim",
    "num_query_heads",
    "num_kv_heads",
    "mlp_dim",
    "moe_mlp_dim",
    "num_decoder_layers",
)
# An enum's member as str() writes it: DecoderBlockType.MIXTRAL, for mixtral.
_ENUM = re.compile(r"[A-Z][A-Za-z]+Type\.([A-Z0-9_]+)")
# One CPU device, every expert for every token, full fp32 products; nothing read, nothing written.
_EVALUATION = {
    "override_model_config": True,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "run_name": "moeconv-verify",
    "base_output_directory": "/nonexistent/moeconv-verify",
    "enable_checkpointing": False,
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "log_config": False,
    "per_device_batch_size": 1,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": False,
    "matmul_precision": "highest",
    "weight_dtype": "float32",
    "enable_dropout": False,
    "cast_logits_to_fp32": True,
}


def build_config(config: Mapping[str, object] | Path, dtype: str) -> Any:
    """MaxText's resolved config for evaluating the model that `config` describes.

    Args:
        config: MaxText keys; or a file that MaxText reads itself, which must be known to hold
            nothing but a model's settings.
        dtype: What activations are computed in.
    """
    from maxtext.configs import pyconfig, types

    if isinstance(config, Path):
        return _initialized(config, _EVALUATION | {"dtype": dtype})
    if config.get("quantization"):
        raise UnsupportedError(
            f"The run's config has quantization: {config['quantization']}; "
            "only models that compute unquantised can be evaluated."
        )
    wanted = set(_MODEL_KEYS)
    for group in _MODEL_GROUPS:
        wanted |= set(getattr(types, group).model_fields)
    wanted = (wanted - _MACHINE_KEYS) & set(types.MaxTextConfig.model_fields)
    overrides = {key: _plain(value) for key, value in config.items() if key in wanted}
    overrides |= _EVALUATION | {"dtype": dtype}
    built = _initialized(Path(pyconfig.__file__).with_name("base.yml"), overrides)
    wrong = [
        f"{key}: {config[key]} given, {built.get_keys()[key]} derived"
        for key in _DERIVED_DIMENSIONS
        if config.get(key) is not None and config[key] != built.get_keys()[key]
    ]
    if wrong:
        raise ConfigError(
            "The run's config contradicts itself; give the base_* keys: " + "; ".join(wrong)
        )
    return built


def _initialized(base: Path, overrides: Mapping[str, object]) -> Any:
    from maxtext.configs import pyconfig

    try:
        with flags_kept():
            return pyconfig.initialize(["", str(base)], **overrides)
    except (Exception, SystemExit) as error:  # outside of pytest MaxText exits
        cause = (error.__context__ or error) if isinstance(error, SystemExit) else error
        raise ConfigError(f"MaxText does not accept the run's config: {cause}") from cause


def _plain(value: object) -> object:
    """A value of MaxText's resolved config as its YAML would have it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str) and (member := _ENUM.fullmatch(value)):
        return member[1].lower()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence logs below CRITICAL, stdout and warnings: MaxText and Orbax report every step."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def flags_kept() -> Iterator[None]:
    """Undo MaxText's config setting XLA_FLAGS, where none were set, to dump into /tmp/xla_dump."""
    before = os.environ.get("XLA_FLAGS")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("XLA_FLAGS", None)
