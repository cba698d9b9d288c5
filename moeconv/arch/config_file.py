"""Files that hold a run's config: MaxText's YAML, its own log, and what W&B recorded.

At its start MaxText logs every resolved setting, sorted, as `Config param KEY: VALUE`
(configs/pyconfig.py `initialize`; 0.1.0: pyconfig.py `HyperParameters`). Python writes the values.
A run's `config.yaml` of W&B has `KEY: {desc: …, value: VALUE}`.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.arch.yaml_file import SIZE_LIMIT, key_lines, read_yaml, short
from moeconv.errors import ConfigError
from moeconv.untrusted.files import is_file, open_inside, open_regular, read_inside, read_regular

_LOGGED = re.compile(rb"^(?!\s*#).*?\bConfig param ([A-Za-z_]\w{0,99}): (.*)$", re.ASCII)
_MARK = b"Config param "
_COLOUR = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")  # of a terminal
_LONGEST_LINE = 64 * 1024
# MaxText logs its settings before the first step (configs/pyconfig.py): what follows is not read.
_READ = 2**28
_LONGEST_NUMBER = 100
_MOST_KEYS = 5000
# Settings of every release, first and last of the sorted list among them, and how many a resolved
# config has at least (0.1.0 has the fewest).
_SURE = ("adam_b1", "decoder_block", "emb_dim", "num_decoder_layers", "weight_dtype")
_LEAST = 300


@dataclass(frozen=True)
class ConfigFile(Mapping[str, Any]):
    """What a file says.

    Attributes:
        settings: By MaxText key.
        where: The file and line of each, where they are known.
        kind: What it is, for people.
        whole: False where settings that it does not have need not be at MaxText's defaults: a part
            of a resolved config.
        twice: Settings that stand there with two values: both places.
    """

    settings: Mapping[str, Any]
    where: Mapping[str, str] = field(default_factory=dict)
    kind: str = "YAML"
    whole: bool = True
    twice: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def resolved(self) -> bool:
        """True if it holds what MaxText made of a run's settings, not what it was given."""
        return all(key in self.settings for key in _SURE) and len(self.settings) >= _LEAST


def load_config_file(path: Path) -> ConfigFile:
    """The keys of a MaxText YAML and of the files it builds on, of a log, or of W&B's record.

    Raises:
        ConfigError: A file cannot be read, or is none of these.
    """
    try:
        logged = _read_log(path)
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    return logged or _load(path, set())


def read_found(folder: Path, name: str) -> ConfigFile | None:
    """A resolved config in a folder that others may have filled; None if the file is no such."""
    try:
        if name.endswith((".yml", ".yaml")):
            text = read_inside(folder, name, limit=SIZE_LIMIT).decode("utf-8-sig")
            content = read_yaml(text)
            found = _from_yaml(folder / name, text, content) if isinstance(content, dict) else None
        else:
            found = _read_log(folder / name, folder)
    except (OSError, ValueError, ConfigError):
        return None
    return found if found is not None and found.resolved else None


def _read_log(path: Path, folder: Path | None = None) -> ConfigFile | None:
    """The settings that a log has; None where it has none."""
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    twice: dict[str, tuple[str, str]] = {}
    opened = (
        open_regular(path)
        if folder is None
        else open_inside(folder, path.relative_to(folder).as_posix())
    )
    with opened as file:
        number = read = 0
        while read < _READ and (line := file.readline(_LONGEST_LINE)):
            number, read = number + line.endswith(b"\n"), read + len(line)
            if b"Config" not in line:
                continue
            line = _COLOUR.sub(b"", line).rstrip()
            if _MARK not in line or not (match := _LOGGED.match(line)):
                continue
            key = match[1].decode()
            place = f"{path}:{number}"
            value = _logged(match[2].decode(errors="replace"))
            if key in values and values[key] != value:
                twice.setdefault(key, (where[key], place))
            values[key], where[key] = value, place
            if len(values) > _MOST_KEYS:
                raise ConfigError(f"--config {path} logs more than {_MOST_KEYS} settings")
    if not values:
        return None
    found = ConfigFile(values, where, "MaxText's log", twice=twice)
    return found if found.resolved else ConfigFile(values, where, found.kind, False, twice)


def _logged(text: str) -> Any:
    """A value as Python printed it."""
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    for parse in (int, float) if len(text) <= _LONGEST_NUMBER else ():
        try:
            return parse(text)
        except ValueError:
            pass
    if text[:1] in ("[", "(", "{", "'", '"'):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    return text


def _load(path: Path, seen: set[Path], folder: Path | None = None) -> ConfigFile:
    """Reads a file that the user named, or one that another names, which must be in `folder`."""
    try:
        if folder is None:
            raw = read_regular(path, limit=SIZE_LIMIT)
        else:
            raw = read_inside(folder, path.relative_to(folder).as_posix(), limit=SIZE_LIMIT)
        text = raw.decode("utf-8-sig")
        content = read_yaml(text)
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    except ValueError as error:  # also bytes that are no text
        raise ConfigError(f"--config {path} is not YAML of MaxText: {error}") from None
    if content is None:
        return ConfigFile({})
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds no `key: value` lines, so it is no MaxText config"
        )
    own = _from_yaml(path, text, content)
    parent = own.get("base_config")
    if own.kind != "YAML" or not parent or Path(str(parent)).name == "base.yml":
        return own
    above = path.parent / str(parent)
    if Path(str(parent)).is_absolute() or ".." in Path(str(parent)).parts:
        raise ConfigError(
            f"--config {path}: its base_config {short(parent)} leads out of {path.parent}; copy "
            "that file beside it and give its name alone"
        )
    seen = {*seen, path.resolve()}
    why = ""
    try:
        there = is_file(path.parent, str(parent)) and above.resolve() not in seen
    except OSError as error:  # a name that is none, a link that leads out, a FIFO
        there, why = False, f" ({short(error.strerror, 300)})"
    if not there:
        raise ConfigError(
            f"--config {path}: its base_config {short(parent)} is not at {short(above, 200)}{why}; "
            "copy it there"
        )
    base = _load(above, seen, path.parent)
    return ConfigFile({**base.settings, **own.settings}, {**base.where, **own.where})


def _from_yaml(path: Path, text: str, content: Mapping[str, Any]) -> ConfigFile:
    """A YAML's keys, or those of W&B's record."""
    where = {key: f"{path}:{line}" for key, line in key_lines(text).items()}
    if "_wandb" in content or "wandb_version" in content:
        values = {
            key: entry["value"]
            for key, entry in content.items()
            if isinstance(entry, dict) and "value" in entry and key != "_wandb"
        }
        found = ConfigFile(values, where, "W&B's record of the run")
        return found if found.resolved else ConfigFile(values, where, found.kind, False)
    return ConfigFile(content, where)
