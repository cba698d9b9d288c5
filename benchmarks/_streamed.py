"""A checkpoint of one layer that is larger than memory: the shapes by the family's page, bfloat16.

Its arrays are drawn and written chunk by chunk, in chunks of a few experts as a sharded run leaves
them, by the writer of tests/orbax_writer.py.
"""

import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from moeconv.arch.layout import StoredParameter, build_layout
from moeconv.arch.parameters import LayerKind
from moeconv.families import blocks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

# Experts of a chunk.
_EXPERTS = 4
# Axes that a matmul sums over, by the end of a parameter's name; D for the others.
_SUMMED = {
    "out.kernel": "Hhv",
    "wo": "M",
    "wo.kernel": "FS",
    "wq_b.kernel": "q",
    "wkv_b.kernel": "c",
}


@dataclass(frozen=True)
class Drawn:
    """Random values of an array, drawn where they are asked for: logits come out near 1."""

    stored: StoredParameter
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        name = self.stored.parameter.name
        seed = [zlib.crc32(name.encode()), *(part.start for part in box)]
        shape = [part.stop - part.start for part in box]
        drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
        if name.endswith("scale"):
            return (1 + drawn / 4).astype(self.dtype)
        if name.endswith("bias"):
            return (drawn / 4).astype(self.dtype)
        ends = (axes for end, axes in _SUMMED.items() if name.endswith(end))
        summed, sizes = next(ends, "D"), zip(self.stored.axes, self.shape, strict=True)
        width = math.prod(size for axis, size in sizes if axis in summed)
        return (drawn * np.float32(1.5 / math.sqrt(width))).astype(self.dtype)


def write(run_dir: Path, overrides: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a one-layer model, and beside it config.yml."""
    import orbax_writer

    block = blocks()[overrides["decoder_block"]]
    (kind,) = (
        k for k in block.layers if k.attention in _attention(overrides) and _routed(k, overrides)
    )
    layout = build_layout(
        block,
        next(way for way in block.stackings if not way.scanned),
        [kind],
        _sizes(overrides),
        blocks=[(0, 0)] * (len(block.stackings[0].segments) - 1) + [(1, 1)],
    )
    arrays = {stored.path: Drawn(stored) for stored in layout.arrays}
    chunks = {
        stored.path: tuple(
            min(_EXPERTS, size) if axis == "E" else size
            for axis, size in zip(stored.axes, stored.shape, strict=True)
        )
        for stored in layout.arrays
        if len(stored.axes) > 2
    }
    orbax_writer.write(run_dir / "checkpoints" / "1", arrays, chunks, scan_layers=False, parts=1)
    (run_dir / "config.yml").write_text(yaml.safe_dump(dict(overrides)))


def _attention(given: Mapping[str, Any]) -> tuple[str, ...]:
    return ("mla_lora",) if given.get("q_lora_rank") else ("qk_norm",)


def _routed(kind: LayerKind, given: Mapping[str, Any]) -> bool:
    return kind.mlp == "moe" and (kind.variant == "bias") == bool(given.get("routed_bias"))


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
    """Lengths of the axes of arch/parameters.py."""
    heads, rotary = given["base_num_query_heads"], given.get("qk_rope_head_dim", 0)
    nope, value, rank = (
        given.get(k, 0) for k in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    return {
        "V": given["vocab_size"],
        "D": given["base_emb_dim"],
        "H": heads,
        "K": given["base_num_kv_heads"],
        "h": given.get("head_dim", 0),
        "n": given.get("head_dim", 0),
        "m": given.get("head_dim", 0),
        "M": given["base_moe_mlp_dim"],
        "E": given["num_experts"],
        "S": given.get("shared_experts", 0) * given["base_moe_mlp_dim"],
        "q": given.get("q_lora_rank", 0),
        "c": rank,
        "v": value,
        "r": rank + rotary,
        "k": nope + rotary,
        "b": nope + value,
    }
