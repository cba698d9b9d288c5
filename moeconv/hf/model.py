"""A Hugging Face model, as a source: config.json, the index, and boxes of its tensors.

Nothing in it is executed, and no file outside of it is read. Tensors are read by offset, as their
files' headers say; the weights are never looked at before that.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from moeconv.errors import (
    ConfigError,
    MoeconvError,
    NotACheckpointError,
    TensorError,
)
from moeconv.hf.files import Files
from moeconv.hf.quantised import quantised
from moeconv.hf.safetensors import TensorSpec
from moeconv.tensor.axes import Array, Box
from moeconv.tensor.dtypes import STORED
from moeconv.tensor.quantised import Scales
from moeconv.tensor.stored import ArrayInfo, Reader
from moeconv.untrusted import strict_json
from moeconv.untrusted.text import listing, printable

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_JSON_LIMIT = 256 * 2**20  # the index of a model of a trillion parameters has some 20 MB

# Weights in other formats, by how their names end, and what to do with them.
_OTHERS = {
    ".gguf": "is GGUF, which is quantised for llama.cpp; convert the Hugging Face model that it "
    "was made from",
    ".bin": "is pickled by torch, which moeconv never loads; save the model once with "
    "transformers' save_pretrained, which writes safetensors",
    ".pt": "is pickled by torch, which moeconv never loads; save it as safetensors",
    ".pth": "is pickled by torch, which moeconv never loads; save it as safetensors",
    ".h5": "is TensorFlow's; save the model as safetensors",
    ".msgpack": "is Flax's; save the model as safetensors",
}
# By these a folder is a model's that has lost its config.json.
_WEIGHTS = re.compile(r"(pytorch_)?model.*\.(safetensors(\.index\.json)?|bin)|.+\.gguf")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Stored:
    """A tensor: its shape and dtype, its file, and where it begins there.

    Attributes:
        spec: Its name, shape and dtype.
        file: Its file's name.
        offset: Of its first byte.
        scales: Where it is quantised, its scales.
        nibbles: Two values of 4 bits are in a byte, the first in its lower half.
    """

    spec: TensorSpec
    file: str
    offset: int
    scales: Scales | None = None
    nibbles: bool = False


@dataclass(frozen=True)
class HfModel:
    """A model, its headers read.

    Attributes:
        files: Where it is.
        config: Content of config.json.
        tensors: Every tensor, by name; a quantised weight is one.
        scales: The scales of quantised weights, by name.
    """

    files: Files
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    scales: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return self.files.name

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Names of the files with its tensors."""
        return tuple(sorted({stored.file for stored in self.tensors.values()}))


def is_model(files: Files) -> bool:
    """True if files are a Hugging Face model's: by its config.json, or by weights without one."""
    names = files.sizes().keys()
    with suppress(FileNotFoundError, MoeconvError):
        content = _object(files, CONFIG)
        return not {"model_type", "architectures"}.isdisjoint(content)
    if ADAPTER in names:
        return False
    return any(_WEIGHTS.fullmatch(name) for name in names)


def open_model(files: Files) -> HfModel:
    """Reads config.json, the index and every header.

    Raises:
        NotACheckpointError: There are no weights in safetensors.
        ConfigError: config.json or the index cannot be read.
        TensorError: A file is damaged, or is not what the index says.
        StorageError: The Hub failed.
    """
    names = files.sizes()
    try:
        config = _object(files, CONFIG)
    except FileNotFoundError:
        if SINGLE not in names and INDEX not in names:
            raise _no_weights(files) from None
        raise NotACheckpointError(
            f"{files.name} has no {CONFIG}, which says what the model is; download it"
        ) from None
    tensors: dict[str, Stored] = {}
    try:
        index = _object(files, INDEX).get("weight_map")
    except FileNotFoundError:
        try:
            tensors = _header(files, SINGLE)
        except FileNotFoundError:
            raise _no_weights(files) from None
    else:
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise ConfigError(
                f"{files.name}/{INDEX} has no weight_map from tensors to files; save the model "
                "again"
            )
        for name in sorted(set(index.values())):
            try:
                found = _header(files, name)
            except FileNotFoundError:
                raise NotACheckpointError(
                    f"{files.name}/{printable(name)} is missing, and {INDEX} names it; download "
                    "it, or the model again"
                ) from None
            wrong = {t for t, file in index.items() if file == name} ^ found.keys()
            if wrong:
                raise TensorError(
                    f"{files.name}/{INDEX} and {name} do not agree on these tensors:"
                    f"{listing(sorted(wrong))}\nthe download is incomplete, or of two models"
                )
            tensors |= found
    if not tensors:
        raise NotACheckpointError(f"{files.name} has no tensor in its safetensors files")
    return HfModel(files, config, tensors)


def _object(files: Files, name: str) -> dict[str, Any]:
    where = f"{files.name}/{name}"
    try:
        content = strict_json.loads(files.read(name, _JSON_LIMIT), unique=True)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}; download it, or save it, again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where} should be a JSON object")
    return content


def _header(files: Files, name: str) -> dict[str, Stored]:
    return {t: Stored(spec, name, offset) for t, (spec, offset) in files.header(name).items()}


def _no_weights(files: Files) -> NotACheckpointError:
    names = sorted(files.sizes())
    for name in names:
        for suffix, why in _OTHERS.items():
            if name.endswith(suffix):
                return NotACheckpointError(f"{files.name}/{name} {why}")
    if loose := [name for name in names if name.endswith(".safetensors")]:
        return NotACheckpointError(
            f"{files.name} has {loose[0]}, but neither {SINGLE} nor {INDEX}, which says where "
            "each tensor is; download the index"
        )
    return NotACheckpointError(
        f"{files.name} has a config.json but no weights ({SINGLE}, or {INDEX} and its files); "
        "download them"
    )


def with_quantised(model: HfModel) -> HfModel:
    """A model whose quantised weights are one tensor each, with their scales apart.

    Raises:
        UnsupportedError: It is quantised by a method, or in a variant, that is not read.
        TensorError: A weight lacks its scales, or a tensor holds no numbers.
    """
    specs = {name: stored.spec for name, stored in model.tensors.items()}
    found, parts = quantised(model.config, specs, f"{model.name}/{CONFIG}")
    weights = {
        name: replace(
            model.tensors[weight.values],
            spec=weight.spec,
            scales=weight.scales,
            nibbles=weight.spec.shape != specs[weight.values].shape,
        )
        for name, weight in found.items()
    }
    plain = {name: stored for name, stored in model.tensors.items() if name not in parts}
    scales = {weight.scales.name: model.tensors[weight.scales.name] for weight in found.values()}
    return replace(model, tensors={**plain, **weights}, scales=scales)


@dataclass(frozen=True)
class View:
    """Values of a tensor that follow each other, as an array of its own.

    Attributes:
        tensor: The tensor's name.
        base: Values of the tensor before the first.
        shape: Their shape.
        chunk: What is read at once.
    """

    tensor: str
    base: int
    shape: tuple[int, ...]
    chunk: tuple[int, ...]


@dataclass
class Tensors:
    """Boxes of a model's tensors (`tensor.stored.Source`), by the names of views.

    Attributes:
        model: Whose they are.
        views: The arrays.
    """

    model: HfModel
    views: Mapping[str, View]
    info: Mapping[str, ArrayInfo] = field(init=False)

    def __post_init__(self) -> None:
        self.info = {name: self._describe(name, view) for name, view in self.views.items()}

    def _describe(self, name: str, view: View) -> ArrayInfo:
        dtype = self._stored(view).spec.dtype
        size = int(np.prod(view.chunk)) * STORED[dtype].itemsize
        return ArrayInfo((name,), view.shape, dtype, view.chunk, "none", size)

    def _stored(self, view: View) -> Stored:
        return self.model.scales.get(view.tensor) or self.model.tensors[view.tensor]

    def reader(self, name: str, chunks: int = 1) -> Reader:
        """Opens an array."""
        view = self.views[name]
        stored, files = self._stored(view), self.model.files
        dtype = STORED[stored.spec.dtype]
        if stored.nibbles:
            inner = whole_bytes(view.shape)
            rows = (*view.shape[:inner], math.prod(view.shape[inner:]) // 2)
            offset = stored.offset + view.base // 2
            packed = files.reader(stored.file, np.dtype(np.uint8), offset, rows)
            return NibbleReader(packed, view.shape, stored.spec.dtype)
        offset = stored.offset + view.base * dtype.itemsize
        return files.reader(stored.file, dtype, offset, view.shape)


@dataclass(frozen=True)
class Values:
    """Looks at the values of a model's tensors, of which some may not be there (`Peek`)."""

    model: HfModel

    def is_zero(self, name: str) -> bool:
        """True if a tensor is all zeros."""
        return name in self.model.tensors and not np.any(self._read(name))

    def are_equal(self, names: Sequence[str]) -> bool:
        """True if all these tensors have the same bits."""
        if not all(name in self.model.tensors for name in names):
            return False
        first, *others = (self._read(name).view("u1") for name in names)
        return all(np.array_equal(first, other) for other in others)

    def _read(self, name: str) -> Array:
        shape = self.model.tensors[name].spec.shape
        return Tensors(self.model, {name: View(name, 0, shape, shape)}).reader(name).read(())


def whole_bytes(shape: tuple[int, ...]) -> int:
    """The innermost axes, by the first of them, of which a row of 4-bit values is whole bytes."""
    return next(n for n in range(len(shape) - 1, -1, -1) if math.prod(shape[n:]) % 2 == 0)


class NibbleReader:
    """Cuts boxes from an array of 4-bit values, two in a byte, the first in its lower half.

    int4 has 8 added (compressed_tensors `pack_to_int32`), e2m1 is as it is.
    """

    def __init__(self, packed: Reader, shape: tuple[int, ...], dtype: str) -> None:
        """Takes it apart.

        Args:
            packed: Of the bytes: the axes before `whole_bytes`, and one of those behind.
            shape: Of the values.
            dtype: Theirs.
        """
        self._packed, self._shape, self._inner = packed, shape, whole_bytes(shape)
        self._dtype, self._flip = STORED[dtype], 8 if dtype == "int4" else 0

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory."""
        box = (*box, *[slice(None)] * (len(self._shape) - len(box)))
        outer, inner = box[: self._inner], box[self._inner :]
        whole, first = self._shape[self._inner :], inner[0]
        bytes_of = slice(0, math.prod(whole) // 2)
        if len(inner) == 1 and isinstance(first, slice):  # no more than the bytes of the box
            start, stop, _ = first.indices(whole[0])
            begin, end = start // 2, -(-stop // 2)
            bytes_of = slice(begin, end)
            inner, whole = (slice(start - 2 * begin, stop - 2 * begin),), (2 * (end - begin),)
        found = self._packed.read((*outer, bytes_of))
        apart = np.stack([found & 0xF, found >> 4], axis=-1) ^ np.uint8(self._flip)
        apart = apart.view(self._dtype).reshape(*found.shape[:-1], *whole)
        return np.ascontiguousarray(apart[(..., *inner)])

    def decode(self, box: Sequence[tuple[int, int]]) -> bool:
        """Fetches the bytes of a box."""
        outer, inner = box[: self._inner], box[self._inner :]
        size = math.prod(self._shape[self._inner :])
        begin, end = (inner[0][0], inner[0][1]) if len(inner) == 1 else (0, size)
        return self._packed.decode((*outer, (begin // 2, -(-end // 2))))
