"""Tiny models as publishers store them: made by transformers, quantised here with numpy alone."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from moeconv.conversion.api import ConvertOptions, convert
from moeconv.conversion.incoming import plan_incoming
from moeconv.conversion.prepare import plan_conversion
from moeconv.hf.files import LocalFiles

Tensors = dict[str, torch.Tensor]

_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def config(kind: str, **more: Any) -> Any:
    """A config of a class of transformers, of tiny sizes."""
    return getattr(transformers, kind)(**{**_SIZES, **more})


def save(folder: Path, made: Any, model: Any = transformers.AutoModelForCausalLM) -> Tensors:
    """A model of a config with any weights in bfloat16, as transformers saves it."""
    torch.manual_seed(0)
    own = model.from_config(made) if hasattr(model, "from_config") else model(made)
    for parameter in own.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + float(parameter.ndim == 1)
    own.to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: Tensors, **keys: Any) -> None:
    """Replaces the weights, and keys of the config."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def chosen(tensors: Tensors, pattern: str) -> dict[str, np.ndarray]:
    """The matrices that are quantised, in float32."""
    return {
        name: tensor.float().numpy()
        for name, tensor in tensors.items()
        if re.fullmatch(pattern, name)
    }


def fp8(
    folder: Path, tensors: Tensors, pattern: str, block: tuple[int, ...], **keys: Any
) -> Tensors:
    """FP8 in blocks, as DeepSeek-V3 is published; the numbers that they stand for."""
    rng = np.random.default_rng(0)
    stored = dict(tensors)
    for name, matrix in chosen(tensors, pattern).items():
        grid = [-(-size // step) for size, step in zip(matrix.shape, block, strict=True)]
        scales = np.exp2(rng.uniform(-9, -6, grid)).astype(np.float32)
        spread = scales
        for axis, step in enumerate(block):
            spread = np.repeat(spread, step, axis)
        spread = spread[tuple(slice(0, size) for size in matrix.shape)]
        values = np.clip(matrix / spread, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        stored[name] = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.from_numpy(scales)
        # As transformers and DeepSeek compute it: in float32.
        product = values.astype(np.float32) * spread
        tensors = {**tensors, name: torch.from_numpy(product).to(torch.bfloat16)}
    method = {"quant_method": "fp8", "weight_block_size": list(block[-2:]), **keys}
    rewrite(folder, stored, quantization_config=method)
    return tensors


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(folder: Path, tensors: Tensors) -> Tensors:
    """The experts of a GPT-OSS in MXFP4, any codes and exponents; the numbers they stand for."""
    rng = np.random.default_rng(0)
    stored, numbers = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not re.fullmatch(r".*\.experts\.(gate_up_proj|down_proj)", name):
            continue
        experts, inner, outer = tensor.shape  # transposed where they are numbers
        codes = rng.integers(0, 16, (experts, outer, inner), dtype=np.uint8)
        exponents = rng.integers(120, 126, (experts, outer, inner // 32), dtype=np.uint8)
        del stored[name]
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        blocks = packed.reshape(experts, outer, inner // 32, 16)
        stored[f"{name}_blocks"] = torch.from_numpy(blocks)
        stored[f"{name}_scales"] = torch.from_numpy(exponents)
        wide = np.ldexp(E2M1[codes], np.repeat(exponents.astype(int), 32, -1) - 127)
        numbers[name] = torch.from_numpy(wide.swapaxes(1, 2).copy()).to(torch.bfloat16)
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    rewrite(folder, stored, quantization_config=method)
    return numbers


INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 16,
            },
        }
    },
}


def int4(folder: Path, tensors: Tensors, pattern: str, group: int = 16) -> Tensors:
    """int4 in groups, as Kimi-K2 is published; the numbers that they stand for.

    The packing is that of compressed_tensors `pack_to_int32`: value i is in bits 4 * i of a word,
    and has 8 added.
    """
    rng = np.random.default_rng(0)
    stored, numbers = dict(tensors), dict(tensors)
    for name, matrix in chosen(tensors, pattern).items():
        rows, columns = matrix.shape
        values = rng.integers(-8, 8, matrix.shape)
        scales = torch.from_numpy(rng.uniform(1e-3, 1e-2, (rows, columns // group)))
        scales = scales.to(torch.bfloat16)
        words = np.zeros((rows, columns // 8), np.uint32)
        for i in range(8):
            words |= (values[:, i::8] + 8).astype(np.uint32) << np.uint32(4 * i)
        del stored[name]
        stored[f"{name}_packed"] = torch.from_numpy(words.view(np.int32))
        stored[f"{name}_scale"] = scales
        stored[f"{name}_shape"] = torch.tensor(matrix.shape)
        # compressed_tensors `_dequantize`: in the dtype of the scales.
        spread = scales.repeat_interleave(group, 1)
        numbers[name] = torch.from_numpy(values).to(torch.bfloat16) * spread
    rewrite(folder, stored, quantization_config=INT4)
    return numbers


def there_and_back(folder: Path, work: Path, **options: Any) -> tuple[Tensors, Any]:
    """Converts a model to MaxText and back; its tensors then, and the plan of the way there."""
    prepared = plan_incoming(LocalFiles(folder), ConvertOptions(**options))
    convert(prepared, work / "maxtext")
    convert(plan_conversion(str(work / "maxtext"), ConvertOptions()), work / "back")
    return load_file(work / "back" / "model.safetensors"), prepared.plan


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """The same names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        want = expected[name]
        assert (tensor.shape, tensor.dtype) == (want.shape, want.dtype), name
        assert torch.equal(tensor.view(torch.uint8), want.view(torch.uint8)), name
