"""A Hugging Face model's directory, as a source: config.json, the index, and boxes of its tensors.

Nothing in it is executed, and no file outside of it is read. Tensors are read by offset, as their
files' headers say; the weights are never looked at before that.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.errors import ConfigError, NotACheckpointError, TensorError
from moeconv.hf.quantised import quantised
from moeconv.hf.safetensors import TensorSpec, read_header
from moeconv.tensor.axes import Array, Box
from moeconv.tensor.dtypes import STORED
from moeconv.tensor.quantised import Scales
from moeconv.tensor.stored import ArrayInfo
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import inside, is_file, read_inside
from moeconv.untrusted.text import listing

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


@dataclass(frozen=True)
class Stored:
    """A tensor: its shape and dtype, its file, and the byte at which it begins there.

    Attributes:
        spec: Its name, shape and dtype.
        file: Its file.
        offset: Of its first byte.
        scales: Where it is quantised, its scales.
        nibbles: Two values of 4 bits are in a byte, the first in its lower half.
    """

    spec: TensorSpec
    file: Path
    offset: int
    scales: Scales | None = None
    nibbles: bool = False


@dataclass(frozen=True)
class HfModel:
    """A model's directory, its headers read.

    Attributes:
        folder: Where it is.
        config: Content of config.json.
        tensors: Every tensor, by name; a quantised weight is one.
        scales: The scales of quantised weights, by name.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    scales: Mapping[str, Stored] = field(default_factory=dict)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files of weights."""
        return tuple(sorted({stored.file for stored in self.tensors.values()}))


def is_model(folder: Path) -> bool:
    """True if a folder is a Hugging Face model's, by its config.json."""
    with suppress(OSError, ValueError, RecursionError):
        config = strict_json.loads(read_inside(folder, CONFIG, limit=_JSON_LIMIT))
        return isinstance(config, dict) and not {"model_type", "architectures"}.isdisjoint(config)
    return False


def open_model(folder: Path) -> HfModel:
    """Reads config.json, the index and every header.

    Raises:
        NotACheckpointError: There are no weights in safetensors.
        ConfigError: config.json or the index cannot be read.
        TensorError: A file is damaged, or is not what the index says.
    """
    config = _object(folder, CONFIG)
    tensors: dict[str, Stored] = {}
    if is_file(folder, INDEX):
        index = _object(folder, INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise ConfigError(
                f"{folder / INDEX} has no weight_map from tensors to files; save the model again"
            )
        for name in sorted(set(index.values())):
            found = _header(folder, name)
            wrong = {t for t, file in index.items() if file == name} ^ found.keys()
            if wrong:
                raise TensorError(
                    f"{folder / INDEX} and {name} do not agree on these tensors:"
                    f"{listing(sorted(wrong))}\nthe download is incomplete, or of two models"
                )
            tensors |= found
    elif is_file(folder, SINGLE):
        tensors = _header(folder, SINGLE)
    else:
        raise _no_weights(folder)
    if not tensors:
        raise NotACheckpointError(f"{folder} has no tensor in its safetensors files")
    return HfModel(folder, config, tensors)


def _object(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = strict_json.loads(read_inside(folder, name, limit=_JSON_LIMIT), unique=True)
    except FileNotFoundError:
        raise NotACheckpointError(f"{folder} has no {name}, so it is no model") from None
    except OSError as error:
        raise ConfigError(f"{folder / name} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / name} is no JSON: {error}; save the model again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{folder / name} should be a JSON object")
    return content


def _header(folder: Path, name: str) -> dict[str, Stored]:
    try:
        path = inside(folder, name)
    except FileNotFoundError:
        path = None
    except OSError as error:
        raise TensorError(f"{folder / name} cannot be read: {error.strerror or error}") from None
    if path is None or not path.exists():
        raise NotACheckpointError(
            f"{folder / name} is missing, and {INDEX} names it; download it, or the model again"
        )
    header = read_header(path, foreign=True)
    return {t: Stored(spec, path, offset) for t, (spec, offset) in header.items()}


def with_quantised(model: HfModel) -> HfModel:
    """A model whose quantised weights are one tensor each, with their scales apart.

    Raises:
        UnsupportedError: It is quantised by a method, or in a variant, that is not read.
        TensorError: A weight lacks its scales, or a tensor holds no numbers.
    """
    specs = {name: stored.spec for name, stored in model.tensors.items()}
    found, parts = quantised(model.config, specs, str(model.folder / CONFIG))
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


def _no_weights(folder: Path) -> NotACheckpointError:
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if (why := _OTHERS.get(path.suffix)) is not None:
                return NotACheckpointError(f"{path} {why}")
        loose = sorted(folder.glob("*.safetensors"))
        if loose:
            return NotACheckpointError(
                f"{folder} has {loose[0].name}, but neither {SINGLE} nor {INDEX}, which says where "
                "each tensor is; download the index"
            )
    return NotACheckpointError(
        f"{folder} has a config.json but no weights ({SINGLE}, or {INDEX} and its files); download "
        "them"
    )


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

    def reader(self, name: str, chunks: int = 1) -> "Reader | NibbleReader":
        """Opens an array."""
        view = self.views[name]
        stored = self._stored(view)
        dtype, shape, base = STORED[stored.spec.dtype], view.shape, view.base
        if stored.nibbles:
            dtype, shape, base = np.dtype(np.uint8), (math.prod(shape) // 2,), base // 2
        try:
            values = np.memmap(
                stored.file,
                dtype,
                mode="r",
                offset=stored.offset + base * dtype.itemsize,
                shape=shape,
            )
        except (OSError, ValueError) as error:
            raise TensorError(f"{stored.file} was cut or removed: {error}") from None
        if stored.nibbles:
            return NibbleReader(values, view.shape, stored.spec.dtype)
        return Reader(values)


class Reader:
    """Cuts boxes from one array."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory."""
        return np.array(self._values[box], order="C", subok=False)

    def decode(self, box: Any) -> bool:
        """Nothing is compressed."""
        return True


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


class NibbleReader:
    """Cuts boxes from an array of 4-bit values, two in a byte, the first in its lower half.

    int4 has 8 added (compressed_tensors `pack_to_int32`), e2m1 is as it is.
    """

    def __init__(self, values: Array, shape: tuple[int, ...], dtype: str) -> None:
        # The innermost axes of which a row is whole bytes.
        self._inner = next(
            n for n in range(len(shape) - 1, -1, -1) if math.prod(shape[n:]) % 2 == 0
        )
        self._shape = shape
        self._values = values.reshape(*shape[: self._inner], -1)
        self._dtype, self._flip = STORED[dtype], 8 if dtype == "int4" else 0

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory."""
        box = (*box, *[slice(None)] * (len(self._shape) - len(box)))
        outer, inner = box[: self._inner], box[self._inner :]
        whole, first = self._shape[self._inner :], inner[0]
        if len(inner) == 1 and isinstance(first, slice):  # no more than the bytes of the box
            start, stop, _ = first.indices(whole[0])
            begin, end = start // 2, -(-stop // 2)
            outer = (*outer, slice(begin, end))
            inner, whole = (slice(start - 2 * begin, stop - 2 * begin),), (2 * (end - begin),)
        found = np.array(self._values[outer], order="C", subok=False)
        apart = np.stack([found & 0xF, found >> 4], axis=-1) ^ np.uint8(self._flip)
        apart = apart.view(self._dtype).reshape(*found.shape[:-1], *whole)
        return np.ascontiguousarray(apart[(..., *inner)])

    def decode(self, box: Any) -> bool:
        """Nothing is compressed."""
        return True
