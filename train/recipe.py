"""Which config a run has: a packaged recipe or a file of the user's, and `key=value` over it."""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from moeconv_train.preflight.config import maxtext_defaults, value_of
from moeconv_train.settings import PREFIX, RunFile, nearest, read_settings, run_file_of
from moeconv_train.values import BOUNDED, check_bounds, check_values, field_types

from moeconv.errors import ConfigError, UsageError

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = "llama3_moe_200m_tinystories"
# MaxText takes them from its command line, where everybody on the machine can read them.
_SECRETS = ("hf_access_token",)


@dataclass(frozen=True)
class Recipe:
    """A config file, and what was said over it.

    Attributes:
        name: Of the recipe, or the file as given.
        file: MaxText's YAML.
        keys: What the file says, with the files it is based on, over MaxText's base.yml.
        given: The command line's MaxText settings, each the text that was given.
        run: What is not MaxText's.
        told: The `run.…` settings of the command line.
        epochs: Of the run file itself, which the config's `steps` are about.
    """

    name: str
    file: Path
    keys: Mapping[str, Any]
    given: Mapping[str, str]
    run: RunFile
    told: frozenset[str]
    epochs: int | None = None


def recipes() -> list[str]:
    """The names of the packaged recipes, the default one first."""
    names = {file.stem for file in CONFIGS.glob("*.yml") if not file.stem.endswith(".run")}
    return sorted(names, key=lambda name: (name != DEFAULT, name))


def read(words: Iterable[str]) -> Recipe:
    """The recipe that a command line names: `[RECIPE|FILE.yml] [key=value …]`.

    Raises:
        UsageError: A word that is neither, a recipe that is none, a key that MaxText has not.
        ConfigError: A file cannot be read.
    """
    names: list[str] = []
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).is_file():
            names.append(word)
        elif not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise UsageError(f"{word!r} is neither a recipe, a file nor key=value")
        elif given.setdefault(key, value) != value:
            raise UsageError(f"{key}: is given twice, as {given[key]} and as {value}")
    if len(names) > 1:
        raise UsageError(
            f"{names[1]!r}: only one recipe or file can be trained; settings are written key=value"
        )
    file = _find(names[0] if names else DEFAULT)
    maxtext = {key: value for key, value in given.items() if not key.startswith(PREFIX)}
    ours = {key: value for key, value in given.items() if key.startswith(PREFIX)}
    run_file = run_file_of(file)
    keys = read_config(file)
    _check_keys(keys, f"{file}: ", ConfigError)
    _check_keys(maxtext, "", UsageError)
    _check_values(file, keys, maxtext)
    run_settings = read_settings(run_file if run_file.is_file() else None, {})
    return Recipe(
        name=names[0] if names else DEFAULT,
        file=file,
        keys=keys,
        given=maxtext,
        run=read_settings(run_file if run_file.is_file() else None, ours, maxtext),
        told=frozenset(key.removeprefix(PREFIX) for key in ours),
        epochs=run_settings.epochs,
    )


def read_config(file: Path) -> dict[str, Any]:
    """The keys of a MaxText YAML with all that it is based on, but for MaxText's base.yml.

    As pyconfig.py does it: `base_config` is looked for beside the file, then among MaxText's own;
    `model_name` brings its file of settings, below the config's own keys only with
    `override_model_config` (else MaxText itself refuses a key that is in both).

    Raises:
        ConfigError: A file is missing or not YAML.
    """
    keys = _chain(file, set())
    name = keys.get("model_name")
    if name and name != "default":
        model = _maxtext_configs() / "models" / f"{str(name).replace('-Instruct', '')}.yml"
        if model.is_file():
            return {**_load(model), **keys}
    return keys


def _chain(file: Path, seen: set[Path]) -> dict[str, Any]:
    if file.resolve() in seen:
        raise ConfigError(f"{file}: its base_config leads back to it")
    seen.add(file.resolve())
    keys = _load(file)
    base = keys.pop("base_config", None)
    if not base or base == "base.yml":
        return keys
    places = [file.parent / str(base), _maxtext_configs() / str(base)]
    below = next((place for place in places if place.is_file()), None)
    if below is None:
        raise ConfigError(f"{file}: base_config: there is no {base} beside it, nor in MaxText")
    if below.resolve() == (_maxtext_configs() / "base.yml").resolve():
        return keys
    return {**_chain(below, seen), **keys}


def _load(file: Path) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: cannot be read as YAML ({reason})") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"{file}: must be MaxText settings, such as `steps: 100`")
    return {str(key): value_of(value) for key, value in keys.items()}


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".yml" and path.is_file():
        return path
    if name in recipes():
        return CONFIGS / f"{name}.yml"
    if path.is_file():
        raise UsageError(f"{name}: MaxText takes config files named .yml only; rename it")
    if path.suffix in (".yml", ".yaml") or "/" in name:
        raise UsageError(f"{name}: there is no such config file")
    raise UsageError(f"{name!r} is no recipe{nearest(name, recipes())}")


def _check_keys(keys: Iterable[str], where: str, kind: type[Exception]) -> None:
    """Refuses what MaxText would refuse after half a minute, in a list of a thousand names."""
    known = maxtext_keys()
    for key in keys:
        if key in _SECRETS:
            raise kind(f"{where}{key}: secrets come from the environment; set HF_TOKEN instead")
        name = key.split(".", 1)[0]
        if name not in known:
            raise kind(f"{where}{key}: MaxText has no such setting{_near(name, known)}")


def _check_values(file: Path, keys: Mapping[str, Any], given: Mapping[str, str]) -> None:
    """Refuses values that MaxText would refuse after half a minute, and that no plan can hold."""
    source = _types()
    told = {key: value_of(text) for key, text in given.items()}
    check_values(keys, source, f"{file}: ", ConfigError)
    check_values(told, source, "", UsageError)
    # What the file itself has wrong is the file's, until the command line puts it right.
    config = {**maxtext_defaults(), **keys}
    if told.keys() & BOUNDED:
        check_bounds({**config, **told}, "", UsageError)
    else:
        check_bounds(config, f"{file}: ", ConfigError)


def _near(name: str, known: Iterable[str]) -> str:
    found = nearest(name, known)
    return found if "did you mean" in found else "; what is not MaxText's is written run.KEY=VALUE"


@cache
def maxtext_keys() -> frozenset[str]:
    """Every setting of the installed MaxText: base.yml's, and the fields of its types.py."""
    return frozenset(maxtext_defaults()) | frozenset(field_types(_types()))


@cache
def _types() -> str:
    return (_maxtext_configs() / "types.py").read_text(encoding="utf-8")


def _maxtext_configs() -> Path:
    maxtext_defaults()  # says so if MaxText is not installed
    spec = importlib.util.find_spec("maxtext")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)), "configs")
