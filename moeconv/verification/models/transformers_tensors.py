"""The tensors that a Hugging Face model directory stores, read one by one from mapped files."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import TensorError
from moeconv.verification.measure.rounding import Rounding
from moeconv.verification.models.transformers_parts import to_numpy

# Entries of the first axes of a tensor.
Entries = slice | tuple[slice, ...]
# Gives a stored tensor: whole, or these entries of it.
ReadTensor = Callable[[Entries | None], Any]


class StoredTensors:
    """All tensors of the `*.safetensors` of a folder, by name."""

    def __init__(self, folder: Path, rounding: Rounding | None) -> None:
        """Reads the names.

        Args:
            folder: The model.
            rounding: Values are moved as much as this rounds them.

        Raises:
            TensorError: A file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Path] = {}
        self._rounding = rounding
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            except (SafetensorError, OSError) as error:
                raise TensorError(f"{file} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as opened:
            found: list[int] = opened.get_slice(name).get_shape()
        return found

    def readers(self, names: Mapping[str, str]) -> dict[str, ReadTensor]:
        """What gives each of these tensors, by its new name; nothing is read yet."""
        from safetensors import safe_open

        opened = {file: safe_open(file, "pt") for file in {self._files[name] for name in names}}

        def reader(name: str) -> ReadTensor:
            def read(entries: Entries | None) -> Any:
                file: Any = opened[self._files[name]]
                tensor = file.get_slice(name)[entries] if entries else file.get_tensor(name)
                return tensor if self._rounding is None else _moved(self._rounding, tensor)

            return read

        return {new: reader(name) for name, new in names.items()}


def _moved(rounding: Rounding, tensor: Any) -> Any:
    import torch

    return torch.from_numpy(rounding.move(to_numpy(tensor))).to(tensor.dtype)
