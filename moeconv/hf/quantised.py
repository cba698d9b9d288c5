"""Released weights that are quantised: which tensors are one weight, and what its numbers are.

A quantised weight is several tensors: its stored values, the scales of their blocks, perhaps its
shape. They become one `Quantised` tensor, of the name and shape that the weight has in the model.
Its numbers have the dtype in which transformers loads the model: that of its config.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.arch.yaml_file import short
from moeconv.errors import TensorError, UnsupportedError
from moeconv.hf.safetensors import TensorSpec
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.quantised import Scales

# Methods that hf/quantised.py does not read, by the name that config.json has for them.
_OTHERS = {
    "gptq": "whose zero points and order of columns moeconv does not read",
    "awq": "whose interleaved packing moeconv does not read",
    "bitsandbytes": "whose tables of NF4 and of outliers moeconv does not read",
}
_ADVICE = "convert the model in bfloat16, as its publisher or transformers' dequantize makes it"


@dataclass(frozen=True)
class Quantised:
    """A quantised weight.

    Attributes:
        spec: Its name, its shape, and the dtype of its stored values, a key of `MAIN_BITS`.
        values: The tensor that holds them; two 4-bit numbers are in a byte, the first in its lower
            half.
        scales: Its scales.
    """

    spec: TensorSpec
    values: str
    scales: Scales


def quantised(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str
) -> tuple[Mapping[str, Quantised], frozenset[str]]:
    """Finds the quantised weights of a model.

    Args:
        config: Its config.
        tensors: Every tensor as stored, by name.
        where: The config's file, for messages.

    Returns:
        The weights, by name, and the names of all tensors that are parts of them; none of a model
        that is not quantised.

    Raises:
        UnsupportedError: By a method, or in a variant, that is not read.
        TensorError: A weight lacks its scales, or has others than its shape asks for.
    """
    method = config.get("quantization_config", config.get("compression_config"))
    if method is None:
        return {}, frozenset()
    if not isinstance(method, Mapping) or not isinstance(method.get("quant_method"), str):
        raise UnsupportedError(f"{where}: quantization_config names no quant_method; {_ADVICE}")
    name = method["quant_method"]
    if name not in _METHODS:
        why = f", {_OTHERS[name]}" if name in _OTHERS else ""
        raise UnsupportedError(
            f"{where} says that the weights are quantised by {name}{why}; moeconv reads "
            f"{', '.join(_METHODS)}; {_ADVICE}"
        )
    named = config.get("dtype", config.get("torch_dtype"))
    dtype = named if named in DTYPES else "bfloat16"
    try:
        found = list(_METHODS[name](method, tensors, dtype))
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}; {_ADVICE}") from None
    parts = {part for _, own in found for part in own}
    return {weight.spec.name: weight for weight, _ in found}, frozenset(parts)


_Found = Iterator[tuple[Quantised, tuple[str, ...]]]


def _beside(tensors: Mapping[str, TensorSpec], values: str, other: str) -> TensorSpec:
    if other not in tensors:
        raise TensorError(f"{values} is quantised, and its scales {other} are missing")
    return tensors[other]


def _fp8(method: Mapping[str, Any], tensors: Mapping[str, TensorSpec], dtype: str) -> _Found:
    """FP8 in blocks, `X.weight` and `X.weight_scale_inv`; what is not in FP8 is as it seems.

    transformers integrations/finegrained_fp8.py `Fp8Dequantize` multiplies in float32. It takes the
    block from the shapes, and so loads no weight that the block does not divide (a kv_a_proj of
    576 rows); the block is that of the config here, as DeepSeek's `weight_dequant` has it.
    """
    block = method.get("weight_block_size", (128, 128))
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise UnsupportedError(
            f"weight_block_size is {short(block)}; moeconv reads FP8 with a scale for each block"
        )
    for name, spec in tensors.items():
        if not spec.dtype.startswith("float8") or name.endswith("_scale_inv"):
            continue
        scales = _beside(tensors, name, f"{name}_scale_inv")
        blocks = (1,) * (len(spec.shape) - 2) + tuple(block)
        own = Scales(scales.name, scales.dtype, scales.shape, blocks, ("float32", dtype))
        # Of activations, where their scheme is static: of no use to the weights.
        aside = re.sub(r"weight$", "activation_scale", name)
        yield Quantised(spec, name, own), (name, scales.name, aside)


def _mxfp4(method: Mapping[str, Any], tensors: Mapping[str, TensorSpec], dtype: str) -> _Found:
    """MXFP4, `X_blocks` [..., G, 16] and `X_scales` [..., G]: 32 numbers in each group.

    The weight is called `X_blocks`: it is transposed where `X` is not (transformers
    integrations/mxfp4.py `convert_moe_packed_tensors`).
    """
    for name, spec in tensors.items():
        if not name.endswith("_blocks"):
            continue
        scales = _beside(tensors, name, re.sub("_blocks$", "_scales", name))
        if spec.dtype != "uint8" or len(spec.shape) < 2:
            raise TensorError(f"{name} should be bytes, and is {spec.dtype} {list(spec.shape)}")
        *rows, groups, each = spec.shape
        shape = (*rows, groups * each * 2)
        own = Scales(
            scales.name, scales.dtype, scales.shape, (1,) * len(rows) + (2 * each,), (dtype,)
        )
        yield (
            Quantised(TensorSpec(name, "float4_e2m1fn", shape), name, own),
            (name, scales.name),
        )


def _packed(method: Mapping[str, Any], tensors: Mapping[str, TensorSpec], dtype: str) -> _Found:
    """`pack-quantized` of compressed-tensors: eight int4 in an int32, in groups or channels.

    `X.weight` is in `X.weight_packed` [rows, columns / 8], `X.weight_scale` [rows, groups] and
    `X.weight_shape`. The product has the dtype of its scales (compressed_tensors
    quantization/lifecycle/forward_helpers.py `_dequantize`).
    """
    sizes = _group_sizes(method)
    for name, spec in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        base = name.removesuffix("_packed")
        if spec.dtype != "int32" or len(spec.shape) != 2:
            raise TensorError(f"{name} should be rows of int32, and is {list(spec.shape)}")
        for beside in ("zero_point", "g_idx"):
            if f"{base}_{beside}" in tensors:
                raise UnsupportedError(f"{base}_{beside} is there, which moeconv does not read")
        scales = _beside(tensors, name, f"{base}_scale")
        rows, columns = spec.shape[0], spec.shape[1] * 8
        groups = scales.shape[-1] if len(scales.shape) == 2 else 0
        block = columns if None in sizes and groups == 1 else None
        fitting = [size for size in sizes if size and -(-columns // size) == groups]
        if block is None and len(fitting) != 1:
            raise TensorError(
                f"{scales.name} {list(scales.shape)} has no scale for each group of "
                f"{', '.join(map(str, sizes))} of {rows} x {columns}"
            )
        own = Scales(
            scales.name, scales.dtype, scales.shape, (1, block or fitting[0]), (scales.dtype, dtype)
        )
        weight = TensorSpec(base, "int4", (rows, columns))
        yield Quantised(weight, name, own), (name, scales.name, f"{base}_shape")


# What compressed-tensors takes where a config does not say it (quantization/quant_args.py).
_PACKED = {"type": "int", "symmetric": True}


def _group_sizes(method: Mapping[str, Any]) -> list[int | None]:
    """The sizes of groups that a config has, None for channels.

    Raises:
        UnsupportedError: It has weights of another kind.
    """
    groups = method.get("config_groups")
    if method.get("format") != "pack-quantized" or not isinstance(groups, Mapping):
        raise UnsupportedError(
            f"the format of compressed-tensors is {short(method.get('format'))}; moeconv reads "
            "pack-quantized with config_groups"
        )
    sizes: list[int | None] = []
    for group in groups.values():
        own = group.get("weights") if isinstance(group, Mapping) else None
        own = own if isinstance(own, Mapping) else {}
        read = {"num_bits": own.get("num_bits"), **{k: own.get(k, v) for k, v in _PACKED.items()}}
        for key, value in {"num_bits": 4, **_PACKED}.items():
            if read[key] != value:
                raise UnsupportedError(
                    f"{key} of its weights is {short(read[key])}; moeconv reads {value!r}"
                )
        strategy, size = own.get("strategy"), own.get("group_size")
        if strategy == "group" and type(size) is int and size > 0:
            sizes.append(size)
        elif strategy == "channel":
            sizes.append(None)
        else:
            raise UnsupportedError(
                f"the scales of its weights are by {short(strategy)} of {short(size)}; moeconv "
                "reads group and channel"
            )
    return sizes


_METHODS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, TensorSpec], str], _Found]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _packed,
}
