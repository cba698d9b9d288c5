"""Whole models as checkpoints of any size and with any damage, in milliseconds, without MaxText."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax_writer
import yaml

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# Axes: L layers, V vocabulary, D width, F dense and M expert MLP width, E experts, H and K heads.
SIZES: Mapping[str, int] = {
    "L": 4, "V": 64, "D": 16, "F": 24, "M": 24, "E": 4, "H": 4, "K": 2, "h": 4
}  # fmt: skip

_GLOBAL = {
    "token_embedder.embedding": "VD",
    "decoder.decoder_norm.scale": "D",
    "decoder.logits_dense.kernel": "DV",
}
_EVERY = {
    "pre_self_attention_layer_norm.scale": "D",
    "self_attention.query.kernel": "DHh",
    "self_attention.key.kernel": "DKh",
    "self_attention.value.kernel": "DKh",
    "self_attention.out.kernel": "HhD",
    "post_self_attention_layer_norm.scale": "D",
}
_DENSE = {"mlp.wi_0.kernel": "DF", "mlp.wi_1.kernel": "DF", "mlp.wo.kernel": "FD"}
_MOE = {
    "MoeBlock_0.gate.kernel": "DE",
    "MoeBlock_0.wi_0": "EDM",
    "MoeBlock_0.wi_1": "EDM",
    "MoeBlock_0.wo": "EMD",
}

# What shapes cannot tell, as in a user's YAML.
TOLD: Mapping[str, object] = {
    "num_experts_per_tok": 2,
    "rope_max_timescale": 500_000,
    "max_target_length": 64,
}
BLOCKS: Mapping[str, Mapping[str, object]] = {
    "mixtral": {"decoder_block": "mixtral"},
    "envy": {
        "decoder_block": "envy",
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 2,
    },
    "llama2": {"decoder_block": "llama2", "num_experts": 1},
}


@dataclass(frozen=True)
class Synthetic:
    """A checkpoint on disk, and what is in it."""

    run: Path
    step_dir: Path
    config: Mapping[str, object]
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    axes: Mapping[str, str] = field(repr=False)

    @property
    def items(self) -> Path:
        return self.step_dir / "items"

    def config_file(self, folder: Path | None = None, **changes: object) -> Path:
        """The run's YAML; `changes` replace or, with None, remove keys."""
        told = {k: v for k, v in {**self.config, **changes}.items() if v is not None}
        path = (folder or self.run) / "config.yml"
        path.write_text(yaml.safe_dump(told))
        return path


def parameter_axes(block: str, *, layers: int, tied: bool, scanned: bool) -> dict[str, str]:
    """Name and axes of every array of a model."""
    cycle = {"envy": 2}.get(block, 1)
    kinds = {"mixtral": [_MOE], "envy": [_DENSE, _MOE], "llama2": [_DENSE]}[block]
    found = {n: a for n, a in _GLOBAL.items() if not (tied and n == "decoder.logits_dense.kernel")}
    for slot in range(cycle if scanned else layers):
        for name, axes in {**_EVERY, **kinds[slot % cycle]}.items():
            if not scanned:
                found[f"decoder.layers_{slot}.{name}"] = axes
            elif cycle == 1:
                found[f"decoder.layers.{name}"] = f"{axes[0]}L{axes[1:]}"
            else:
                found[f"decoder.layers.layers_{slot}.{name}"] = f"{axes[0]}L{axes[1:]}"
    return found


def write(
    run: Path,
    block: str = "mixtral",
    *,
    sizes: Mapping[str, int] | None = None,
    tied: bool = True,
    scanned: bool = True,
    split: Mapping[str, int] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    step: int = 0,
    change: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None,
    **storage: Any,
) -> Synthetic:
    """Writes `<run>/checkpoints/<step>/items`.

    Args:
        run: The run's directory.
        block: `decoder_block`.
        sizes: Over `SIZES`.
        tied: No output head of its own.
        scanned: Layers stacked on axis 1.
        split: Number of chunks along an axis, by its letter; one by default.
        dtype: Of all arrays.
        seed: Chooses the values.
        step: The step's number.
        change: Damages the arrays (by dotted name) before they are written.
        storage: See `orbax_writer.write`.
    """
    sizes = {**SIZES, **(sizes or {})}
    axes = parameter_axes(block, layers=sizes["L"], tied=tied, scanned=scanned)
    sizes["L"] //= {"envy": 2}.get(block, 1)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, letters in axes.items():
        values = rng.standard_normal([sizes[a] for a in letters], dtype=np.float32)
        values *= 0.1
        arrays[name] = (values + (1 if name.endswith("scale") else 0)).astype(DTYPES[dtype])
    change(arrays)
    chunks = {
        tuple(name.split(".")): tuple(
            -(-n // (split or {}).get(a, 1)) for a, n in zip(axes[name], value.shape, strict=False)
        )
        for name, value in arrays.items()
        if name in axes and len(axes[name]) == value.ndim
    }
    step_dir = orbax_writer.write(
        run / "checkpoints" / str(step),
        {tuple(name.split(".")): value for name, value in arrays.items()},
        chunks,
        scan_layers=scanned,
        **storage,
    )
    return Synthetic(run, step_dir, {**TOLD, **BLOCKS[block]}, arrays, axes)
