"""Adapters as arrays alone: the factors that MaxText gives the parameters of a synthetic model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax_writer
import synthetic
from inputs_lab import converted
from safetensors import safe_open

from moeconv.arch.stacks import stacked_axes

RANK, ALPHA = 3, 4.5
CUSTOM = {"lora": {"enable_lora": True, "lora_rank": RANK, "lora_alpha": ALPHA}}
_LINEAR = ("query", "key", "value", "out", "wq_a", "wq_b", "wkv_a", "wkv_b", "wi_0", "wi_1", "wo")
KeyPath = tuple[str, ...]
Factors = Mapping[KeyPath, np.ndarray]


def adapter(
    root: Path,
    base: synthetic.Synthetic,
    *,
    form: str = "fused",
    only: tuple[str, ...] = (),
    everything: bool = False,
    without: str = "-",
    custom: Mapping[str, Any] = CUSTOM,
    **storage: Any,
) -> tuple[Path, Factors]:
    """Writes `<root>/7` with factors of the linear layers of a model, or of all its parameters.

    Args:
        root: The folder of the step.
        base: The model.
        form: `fused` and `apart` are qwix's, `server` the decode server's.
        only: Keys that a path must have.
        everything: Norms, routers and experts too, as qwix does with `decoder/.*`.
        without: Part of the names of factors that are left out.
        custom: The step's metadata.
        storage: See `orbax_writer.write`.
    """
    factors = {
        path: value
        for name in base.arrays
        if set(only) <= set(keys := tuple(name.split("."))) and (everything or _is_linear(keys))
        and keys[0] == "decoder" and "logits_dense" not in keys
        for path, value in _pair(keys, base, form)
        if without not in path[-1]
    }  # fmt: skip
    step = orbax_writer.write(root / "7", factors, custom=custom, **storage)
    return step, factors


def _is_linear(keys: KeyPath) -> bool:
    return keys[-1] == "kernel" and keys[-2] in _LINEAR


def _pair(keys: KeyPath, base: synthetic.Synthetic, form: str) -> list[tuple[KeyPath, np.ndarray]]:
    axes = base.axes[".".join(keys)]
    stacked, own = "L" in axes, [axis for axis in axes if axis != "L"]
    sizes = dict(zip(axes, base.arrays[".".join(keys)].shape, strict=True))
    batch = own[:1] if own[0] == "E" and len(own) > 1 else []
    plain = own[len(batch) :]
    inner = plain[:-1] if keys[-2] == "out" and len(plain) > 2 else plain[:1]
    outer = plain[len(inner) :]
    sides = []
    for groups in ([*inner, "rank"], ["rank", *batch, *outer]):
        apart = form != "fused" or batch
        names = tuple(groups) if apart else tuple(_fused(groups))
        names = stacked_axes(names, 1, "L") if stacked else names
        shape = [int(np.prod([{**sizes, "rank": RANK}[a] for a in n.split()])) for n in names]
        rng = np.random.default_rng([len(sides), *map(ord, ".".join(keys))])
        sides.append(rng.standard_normal(shape).astype(np.float32))
    if form == "server":
        return [((*keys[:-1], f"lora_{s}.kernel"), v) for s, v in zip("ab", sides, strict=True)]
    return [((*keys[:-1], f"{keys[-1]}_lora_{s}"), v) for s, v in zip("ab", sides, strict=True)]


def _fused(groups: list[str]) -> list[str]:
    at = groups.index("rank")
    before, behind = " ".join(groups[:at]), " ".join(groups[at + 1 :])
    return [each for each in (before, "rank", behind) if each]


def product(base: synthetic.Synthetic, factors: Factors) -> dict[str, np.ndarray]:
    """What is added to each array: alpha / rank · A·B in float64, by einsum over rank."""
    found = {}
    for path, a in factors.items():
        if "lora_a" not in path[-1]:
            continue
        b = factors[(*path[:-1], path[-1].replace("lora_a", "lora_b"))]
        leaf = path[-1].partition("lora_a")
        name = ".".join((*path[:-1], leaf[0].rstrip("_") or leaf[2].lstrip(".")))
        shape, axes = base.arrays[name].shape, base.axes[name]
        at = axes.find("L")
        wide = [x.astype(np.float64) for x in (a, b)]
        if at < 0:
            found[name] = ALPHA / RANK * np.tensordot(wide[0], wide[1], 1).reshape(shape)
            continue
        layers = [
            np.tensordot(np.take(wide[0], i, 1), np.take(wide[1], i, min(1, wide[1].ndim - 1)), 1)
            for i in range(shape[at])
        ]
        if "E" in axes[:1]:  # between the contracted axis and the other
            layers = [np.moveaxis(x, 1, 0) for x in layers]
        one = [n for axis, n in zip(axes, shape, strict=True) if axis != "L"]
        found[name] = ALPHA / RANK * np.stack([x.reshape(one) for x in layers], axis=at)
    return found


def merged_tensors(
    tmp_path: Path, base: synthetic.Synthetic, factors: Factors, block: str, **layout: Any
) -> dict[str, np.ndarray]:
    """The tensors of a model whose only weights are the changes: what is added to each tensor."""
    added = product(base, factors)

    def change(arrays: dict[str, np.ndarray]) -> None:
        for name, value in arrays.items():
            arrays[name] = added.get(name, np.zeros_like(value)).astype(np.float32)

    made = synthetic.write(tmp_path / "added", block, change=change, **layout)
    converted(made, tmp_path / "added-out")
    found = values(tmp_path / "added-out")  # of a norm, Gemma's are the scale less one
    return {name: x for name, x in found.items() if np.any(x) and not name.endswith("norm.weight")}


def values(out: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder."""
    found = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
