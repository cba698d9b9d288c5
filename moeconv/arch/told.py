"""What the user and the run told about a model: config file, sidecar and flags, in one mapping.

Keys are MaxText's own (`rope_max_timescale`, `num_experts_per_tok`, …) plus the three token ids.
Flags win over a config file; a config file replaces the run's sidecar. Keys that a config file
leaves out have the values MaxText would give them: those of `model_name`'s file in configs/models,
then those of configs/base.yml.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moeconv.arch.description import Origin, Provenance
from moeconv.errors import ConfigError

_ENUM = re.compile(r"[A-Z]\w*(?:Type|Mode)\.([A-Z0-9_]+)\Z")

# ValueError: bytes that are no text, or dates and numbers that only look like ones.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# How alike two names must be for one to be the other misspelt; no key of MaxText 0.1.0 to 0.2.5 is.
_MISSPELT = 0.85

# A resolved config holds derived keys too; `emb_dim` is `base_emb_dim` times a power of two.
SCALED_KEYS = {
    "emb_dim": "base_emb_dim",
    "num_query_heads": "base_num_query_heads",
    "num_kv_heads": "base_num_kv_heads",
    "mlp_dim": "base_mlp_dim",
    "moe_mlp_dim": "base_moe_mlp_dim",
    "num_decoder_layers": "base_num_decoder_layers",
}


@dataclass(frozen=True)
class Told:
    """One value, who told it, and whether it was said explicitly or is a default."""

    value: Any
    provenance: Provenance

    @property
    def explicit(self) -> bool:
        """Whether somebody wrote it down for this run, so that it may contradict the shapes."""
        return self.provenance.origin not in (Origin.DEFAULT, Origin.MODEL)


class ToldConfig(Mapping[str, Told]):
    """Everything told, by MaxText key; later layers win."""

    def __init__(self, *layers: Mapping[str, Told]) -> None:
        self._values: dict[str, Told] = {}
        for layer in layers:
            self._values.update(layer)

    def __getitem__(self, key: str) -> Told:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return self._values[key].value if key in self._values else default


@cache
def maxtext_defaults() -> dict[str, Any]:
    """The packaged extract of MaxText's YAML files, made by tools/maxtext_defaults.py."""
    path = resources.files("moeconv.arch") / "data" / "maxtext_defaults.json"
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def from_flags(pairs: Sequence[str]) -> dict[str, Told]:
    """Reads `--set key=value` pairs; values are YAML scalars, as on MaxText's command line.

    Raises:
        ConfigError: A pair without `=`, an unreadable value, or a key that changes nothing here.
    """
    told = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(f"--set {pair!r} is not of the form key=value")
        if key not in known_keys():
            raise ConfigError(
                f"--set {key}: no field of that name decides a conversion; see `moeconv inspect` "
                "for those that do"
            )
        try:
            value = _plain(yaml.safe_load(text))
        except _NOT_YAML as error:
            line = str(error).splitlines()[0]
            raise ConfigError(f"--set {key}: {text!r} is not a YAML value ({line})") from None
        told[key] = Told(value, Provenance(Origin.FLAG, f"--set {pair}"))
    return told


@cache
def known_keys() -> frozenset[str]:
    """Config keys that decide a conversion."""
    return frozenset({*maxtext_defaults()["base"], *SCALED_KEYS, *TOKEN_IDS})


@cache
def maxtext_keys() -> frozenset[str]:
    """Every setting of the newest supported MaxText, written by tools/maxtext_defaults.py."""
    path = resources.files("moeconv.arch") / "data" / "maxtext_keys.json"
    return frozenset(json.loads(path.read_text()))


def check_spelling(keys: Iterable[Any], where: str) -> None:
    """Refuses a key that nearly decides a conversion; what other releases know is let pass.

    Raises:
        ConfigError: Names the key, and the one that is meant.
    """
    names = known_keys()
    for key in map(str, keys):
        if key in names or key in maxtext_keys():
            continue
        plain = key.strip().lower().replace("-", "_").replace(" ", "_")
        if near := difflib.get_close_matches(plain, names, 1, _MISSPELT):
            raise ConfigError(f"{where}: MaxText has no {key}; did you mean {near[0]}?")


def from_config_file(path: Path) -> dict[str, Told]:
    """Reads any MaxText YAML: a run's own (`base_config` is followed), or a resolved config.

    Raises:
        ConfigError: The file or the one it builds on cannot be read or is no YAML mapping, or it
            names a model that MaxText does not ship.
    """
    return from_mapping(load_config_file(path), Provenance(Origin.CONFIG, str(path)))


def load_config_file(path: Path) -> dict[str, Any]:
    """The keys of a MaxText YAML and of the files it builds on, as they stand there.

    Raises:
        ConfigError: A file cannot be read, is no YAML mapping, or has a key misspelt.
    """
    return _load(path, set())


def _load(path: Path, seen: set[Path]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    except _NOT_YAML as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"--config {path} is not YAML: {line}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds no `key: value` lines, so it is no MaxText config"
        )
    check_spelling(content, f"--config {path}")
    parent = content.get("base_config")
    if not parent or Path(str(parent)).name == "base.yml":
        return content
    above = path.parent / str(parent)
    if above.resolve() in seen or not above.is_file():
        raise ConfigError(f"--config {path}: its base_config {parent} is not at {above}")
    return _load(above, {*seen, path.resolve()}) | content


def from_mapping(content: Mapping[str, Any], provenance: Provenance) -> dict[str, Told]:
    """Puts a config over MaxText's defaults, and the model file it names over both.

    In a YAML file `model_name` wins over the file's own keys, as in MaxText (configs/pyconfig.py
    `_initialize_pydantic` merges base, model, command line in that order); a resolved config,
    known by its derived keys, already holds the outcome.

    Raises:
        ConfigError: A key is misspelt, or it names a model that MaxText does not ship.
    """
    check_spelling(content, provenance.detail)
    defaults = maxtext_defaults()
    versions = defaults["maxtext_versions"]
    base = {
        key: Told(value, Provenance(Origin.DEFAULT, f"base.yml, {versions[0]} to {versions[-1]}"))
        for key, value in defaults["base"].items()
    }
    said = {
        str(key): Told(_plain(value), provenance)
        for key, value in content.items()
        if key in known_keys()
    }
    name = str(content.get("model_name") or "default").replace("-Instruct", "")
    if name == "default" or any(key in content for key in SCALED_KEYS):
        return base | said
    if name not in defaults["models"]:
        raise ConfigError(
            f"{provenance.detail}: model_name {name!r} is none of MaxText's models that use a "
            f"supported decoder block ({', '.join(sorted(defaults['models']))}); give the run's "
            "resolved config instead"
        )
    model = {
        key: Told(value, Provenance(Origin.MODEL, f"configs/models/{name}.yml"))
        for key, value in defaults["models"][name].items()
    }
    return base | said | model


def _plain(value: Any) -> Any:
    """A config value as MaxText understands it.

    YAML 1.1 reads `1e-5` as text, MaxText's loader as a number; "none" is None (configs/pyconfig.py
    `_prepare_for_pydantic`); logs of a resolved config print enums as `RopeType.LLAMA3_1`.
    """
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    if match := _ENUM.match(value):
        member = match[1].lower()
        return {"llama3_1": "llama3.1", "none": None}.get(member, member)
    try:
        return float(value)
    except ValueError:
        return value
