"""What a folder or file is that is no Orbax checkpoint, by the names in it; nothing is opened."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from moeconv.errors import NotACheckpointError
from moeconv.orbax.store import Folder
from moeconv.untrusted.text import printable

# The first that a name fits is said.
_KINDS = {
    r"adapter_config\.json": "a LoRA adapter for PEFT, which verify takes if convert wrote it",
    r"moeconv_manifest\.json": "an output of moeconv convert, which verify and push take",
    r".+\.safetensors(\.index\.json)?": "weights of Hugging Face without their config.json; give a "
    "folder with both",
    r"(pytorch_)?model.*\.bin|.+\.(pt|pth)": "weights of PyTorch",
    r".+\.gguf": "a model of llama.cpp",
    r".+\.(index|data-\d+-of-\d+)": "a checkpoint of TensorFlow",
    r".+\.(pkl|pickle|joblib)": "pickled objects, which are never opened",
    r".+\.(npz|npy|h5|hdf5|msgpack)": "arrays in one file, which Orbax never writes",
    r".+\.(tar|tgz|zip|zst|gz|bz2|xz)": "an archive; unpack it, and give what is in it",
    r"checkpoint(_\d+)?": "a checkpoint of Flax, T5X or an early Orbax; load it with what wrote "
    "it, and save it with Orbax",
    r"manifest\.ocdbt|.+\.(kernel|embedding|scale)": "arrays of an Orbax item whose _METADATA is "
    "not there; copy the item whole, or use another step",
}
# Folders whose names are shown, and of which it is found out whether they hold a checkpoint.
_SHOWN, _TRIED = 3, 100


def what_is(names: Iterable[str]) -> str:
    """What a folder holds or a file is, `NAME: …`; empty where no name shows it."""
    names = list(names)
    for pattern, kind in _KINDS.items():
        for name in names:
            if re.fullmatch(pattern, name):
                return f"{printable(name)}: {kind}"
    return ""


def checkpoints_below(folder: Folder, names: Sequence[str]) -> list[str]:
    """Names of the first folders in a local one that hold steps, a run or an item."""
    return list(itertools.islice(_below(folder, names[:_TRIED]), _SHOWN))


def _below(folder: Folder, names: Iterable[str]) -> Iterator[str]:
    for name in names if folder.local is not None else ():
        with contextlib.suppress(NotACheckpointError):
            child = folder / name
            if not child.exists():
                continue
            inside = list(child.children())
            holds = any(re.fullmatch(r"[0-9]{1,18}|checkpoints|_METADATA", each) for each in inside)
            if holds or (child / "items").has("_METADATA"):
                yield name
