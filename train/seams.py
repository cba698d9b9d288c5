"""The files of MaxText whose functions we replace or rely on, each by its content.

A patch of MaxText is right only for the code it was written against. `SOURCES` has the SHA-256 of
that code, of the pinned release; any other is refused before a run begins. After a new release has
been read and the patches fit it, `python tools/seams.py` prints the table anew.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import ConfigError, UnsupportedError

RELEASE = "0.2.5"

SOURCES: Mapping[str, str] = {
    "trainers/pre_train/train.py": "5f95b02c4afbb8a8e8ff0c639f00c5cd71233367add38e3a8f3a8c5bb2e23469",
    "optimizers/optimizers.py": "2a301863786afe8609618c73c81d1d6acb9be8658d82c3f28bb555afe4b87ccb",
    "utils/train_utils.py": "82509bc71aeb70ed9a223251f40d4b66449f0bceb74163c8e22258e9370c929a",
    "common/metric_logger.py": "10c91860a86d4e3e6d6e87a5be65eb3e3b10413e7fca20dc61b5d07180e7a08a",
    "common/data_loader.py": "9429376a293f10ce90d9d2cf9b887a282e5ec5bf6c658e69b0370bccff0f2539",
    "common/checkpointing.py": "71a9eb1510b6bc0b0a42cf44e4d89c7b90ed44cefe66442fbe95f3e2a71e1c76",
    "layers/embeddings.py": "b4a441b059fdb74f10c0c5bb228604531b092eb70d7c6176b20540010380fdfb",
    "layers/nnx_decoders.py": "3c580d8b817a41980c0b94679a89a69629f86cf731a3ea93dc4b4ee8446d0238",
    "layers/moe.py": "403b86fe8d6857d9f622d488ad7e68ba4eb8090288c20af3c84e908e90e37fa8",
    "layers/attention_op.py": "685803c8a80235cb49aca23db4afe2303bf28e9e21a5f9479f3b04c7d611dd80",
    "input_pipeline/grain_data_processing.py": "734f96b2e0c859631b762375112aa7b62550d5d28fd03f054884ac7553529d89",
}


def check(folder: str = "") -> None:
    """Refuses a MaxText whose files are not those that `SOURCES` has, in this folder of it.

    Raises:
        UnsupportedError: One of them is another, or is gone.
    """
    for path, digest in SOURCES.items():
        if path.startswith(folder) and digest_of(path) != digest:
            raise UnsupportedError(
                f"MaxText {importlib.metadata.version('maxtext')} has another {path} than "
                f"{RELEASE}, which moeconv changes for training; install maxtext=={RELEASE}"
            )


def digest_of(path: str) -> str | None:
    """The SHA-256 of a file of MaxText; None if there is none."""
    spec = importlib.util.find_spec("maxtext")
    places = (spec and spec.submodule_search_locations) or ()
    found = next((file for place in places if (file := Path(place, path)).is_file()), None)
    return hashlib.sha256(found.read_bytes()).hexdigest() if found else None


@contextlib.contextmanager
def replaced(owner: Any, **functions: Any) -> Iterator[None]:
    """Sets attributes of `owner`, and puts the old ones back at the end."""
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def value(setting: Any) -> Any:
    """A setting of MaxText's, of an enum its value."""
    return getattr(setting, "value", setting)


def refuse(wrong: Mapping[str, Any], what: str, off: str) -> None:
    """Refuses settings under which MaxText's own function does something that ours does not.

    Args:
        wrong: By name, whether a setting is such a one.
        what: Ours.
        off: The words that turn it off.

    Raises:
        ConfigError: One of them is.
    """
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"{', '.join(names)} does not go with {what}; change it, or set {off}")
