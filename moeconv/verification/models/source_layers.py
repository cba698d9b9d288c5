"""Parameters of a checkpoint one layer at a time, whatever its chunks are.

A single-device run writes one chunk an array, all layers in it. Taking a layer out of such a chunk
decodes all of it each time, so those arrays are first laid out layer by layer in a scratch file,
each chunk read once.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from types import TracebackType

import numpy as np

from moeconv.arch.layout import Layout, StoredParameter
from moeconv.errors import OutputError, TensorError, UnsupportedError
from moeconv.orbax.arrays import Arrays
from moeconv.sizes import format_size
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.stored import ArrayInfo
from moeconv.verification.models import expert_groups

Progress = Callable[[int], None]


class LayerReader:
    """Reads `(parameter, layer)`; a context manager, since it may hold a scratch folder."""

    def __init__(
        self,
        arrays: Arrays,
        layout: Layout,
        *,
        scratch: Path | None = None,
        progress: Progress = lambda done: None,
    ) -> None:
        """Prepares to read.

        Args:
            arrays: The checkpoint, opened.
            layout: Where it keeps its layers.
            scratch: Folder below which a scratch folder is made; the system's own by default.
            progress: Called with bytes of the checkpoint that were laid out.

        Raises:
            UnsupportedError: A parameter is stored quantised: a layer is run on numbers.
        """
        for info in arrays.info.values():
            if info.dtype not in DTYPES:
                raise UnsupportedError(
                    f"parameter {info.name} is stored as {info.dtype}, on which level layers runs "
                    "nothing; give --level weights"
                )
        self._arrays = arrays
        self._held = layout.places
        self._scratch = scratch
        self._progress = progress
        self._folder: Path | None = None
        self._laid: set[str] = set()

    def __enter__(self) -> "LayerReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that laying out takes on disk."""
        return sum(self._arrays.info[name].nbytes for name in self._stacked())

    def lay_out(self) -> None:
        """Puts every array whose chunks hold several layers into the scratch folder.

        Raises:
            OutputError: The disk is too small.
            TensorError: A chunk is damaged.
        """
        names = [name for name in self._stacked() if name not in self._laid]
        if not names:
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="moeconv-verify-", dir=self._scratch))
        needed, free = self.scratch_bytes, shutil.disk_usage(self._folder).free
        if needed > free:
            raise OutputError(
                f"{self._folder.parent} has {format_size(free)} left, but laying the checkpoint's "
                f"layers out takes {format_size(needed)}; point TMPDIR at a larger disk"
            )
        for name in names:
            self._lay_out(name)

    def __call__(self, parameter: str, layer: int | None, experts: slice | None = None) -> Array:
        """One parameter of one layer (None: of the model), in float32, on the parameter's axes.

        Args:
            parameter: Its logical name.
            layer: Its layer.
            experts: Only these entries of its axis `E`, which must be its first.

        Raises:
            TensorError: The checkpoint has no such parameter.
        """
        try:
            stored = self._held[parameter, layer]
        except KeyError:
            where = "" if layer is None else f" of layer {layer}"
            raise TensorError(f"the checkpoint lacks {parameter}{where}") from None
        info, entry = self._arrays.info[stored.name], stored.entry(layer)
        if self._spans_more(stored, info):
            self.lay_out()
            value = self._from_scratch(stored, info, entry, experts)
        else:
            boxes: dict[str, int | slice] = {**entry}
            if experts is not None:
                boxes["E"] = experts
            box = tuple(
                boxes.get(axis, slice(0, n))
                for axis, n in zip(stored.axes, info.shape, strict=True)
            )
            value = self._arrays.reader(info.name).read(box)
        return np.ascontiguousarray(value, np.float32)

    def _stacked(self) -> list[str]:
        found = {stored.name: stored for stored in self._held.values()}
        return [n for n, s in found.items() if self._spans_more(s, self._arrays.info[n])]

    @staticmethod
    def _spans_more(stored: StoredParameter, info: ArrayInfo) -> bool:
        """True if a chunk holds more than is read at once: several layers, or many experts."""
        if any(info.chunk[stored.axes.index(axis)] > 1 for axis in stored.stacked):
            return True
        large = math.prod(info.chunk) * 4 > expert_groups.EXPERT_BYTES
        return large and "E" in stored.axes and info.chunk[stored.axes.index("E")] > 1

    def _axes(self, name: str) -> list[int]:
        """Positions of an array's stacked axes."""
        stored = next(stored for stored in self._held.values() if stored.name == name)
        return [stored.axes.index(axis) for axis in stored.stacked]

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name

    def _lay_out(self, name: str) -> None:
        info, axes = self._arrays.info[name], self._axes(name)
        order = [*axes, *(i for i in range(len(info.shape)) if i not in axes)]
        shape = tuple(info.shape[i] for i in order)
        reader = self._arrays.reader(name)
        for box in _chunks(info):
            chunk = reader.read(box).transpose(order)
            place = tuple(box[i] for i in order)
            # Mapped anew each time, so that written pages do not count as ours for long.
            file = np.memmap(
                self._path(name),
                DTYPES[info.dtype],
                "r+" if self._path(name).exists() else "w+",
                shape=shape,
            )
            file[place] = chunk
            file.flush()
            del file
            self._progress(chunk.nbytes)
        self._laid.add(name)

    def _from_scratch(
        self,
        stored: StoredParameter,
        info: ArrayInfo,
        entry: Mapping[str, int],
        experts: slice | None,
    ) -> Array:
        sizes = dict(zip(stored.axes, info.shape, strict=True))
        plain = tuple(size for axis, size in sizes.items() if axis not in entry)
        number = 0
        for axis in stored.stacked:
            number = number * sizes[axis] + entry[axis]
        count, dtype = math.prod(plain), DTYPES[info.dtype]
        first = number * count
        if experts is not None:
            each = count // plain[0]
            first += experts.start * each
            plain = (experts.stop - experts.start, *plain[1:])
            count = math.prod(plain)
        data = np.fromfile(self._path(info.name), dtype, count, offset=first * dtype.itemsize)
        return data.reshape(plain)


def _chunks(info: ArrayInfo) -> Iterator[tuple[slice, ...]]:
    """The boxes of an array's chunks."""
    for corner in product(*(range(count) for count in info.grid)):
        yield tuple(
            slice(i * c, min((i + 1) * c, n))
            for i, c, n in zip(corner, info.chunk, info.shape, strict=True)
        )
