"""Which config a run has: a packaged recipe or a file of the user's, and `key=value` over it."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moeconv_train.preflight.config import maxtext_configs, maxtext_defaults, value_of
from moeconv_train.settings import PREFIX, RunFile, nearest, read_settings, read_yaml, run_file_of

from moeconv.errors import ConfigError, MoeconvError, UsageError

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
        keys: What the file says, with its model's own file, over MaxText's base.yml.
        given: The command line's MaxText settings, each the text that was given.
        run: What is not MaxText's.
        told: The `run.…` settings of the command line.
    """

    name: str
    file: Path
    keys: Mapping[str, Any]
    given: Mapping[str, str]
    run: RunFile
    told: frozenset[str]


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
    name = names[0] if names else DEFAULT
    file = _find(name)
    maxtext = {key: value for key, value in given.items() if not key.startswith(PREFIX)}
    ours = {key: value for key, value in given.items() if key.startswith(PREFIX)}
    keys = read_config(file, model=maxtext.get("model_name"))
    _check(keys, f"{file}: ", ConfigError)
    _check(maxtext, "", UsageError)
    found = run_file_of(file)
    run_file = found if found.is_file() else None
    return Recipe(
        name=name,
        file=file,
        keys=keys,
        given=maxtext,
        run=read_settings(run_file, ours, maxtext),
        told=frozenset(key.removeprefix(PREFIX) for key in ours),
    )


def read_config(file: Path, model: str | None = None) -> dict[str, Any]:
    """The keys of a MaxText YAML, and below them those of the model that it or `model` names.

    As in pyconfig.py, where a key that is in both needs `override_model_config`.

    Raises:
        ConfigError: The file cannot be read, or rests on another than MaxText's base.yml.
    """
    keys = {str(key): value_of(value) for key, value in read_yaml(file).items()}
    base = keys.pop("base_config", None) or "base.yml"
    if base != "base.yml":
        raise ConfigError(
            f"{file}: base_config: {base}: moeconv reads one file over MaxText's base.yml; copy "
            "the settings of the other into it"
        )
    name = str(model or keys.get("model_name") or "").replace("-Instruct", "")
    below = maxtext_configs() / "models" / f"{name}.yml"
    if below.parent == maxtext_configs() / "models" and below.is_file():
        return {**{key: value_of(value) for key, value in read_yaml(below).items()}, **keys}
    return keys


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


def _check(keys: Mapping[str, Any], where: str, kind: type[MoeconvError]) -> None:
    """Refuses a name that MaxText has not, and a word where a plan counts on a number.

    MaxText itself refuses other values, when it reads the config.
    """
    known, defaults = _types(), maxtext_defaults()
    for key, text in keys.items():
        if key in _SECRETS:
            raise kind(f"{where}{key}: secrets come from the environment; set HF_TOKEN instead")
        name, value = key.split(".", 1)[0], value_of(text)
        if name not in known:
            near = nearest(name, known)
            ours = "; what is not MaxText's is written run.KEY=VALUE"
            near = near if "did you mean" in near else ours
            raise kind(f"{where}{key}: MaxText has no such setting{near}")
        if isinstance(defaults.get(name), bool) or not isinstance(defaults.get(name), (int, float)):
            continue
        number = isinstance(value, (int, float)) and math.isfinite(value)
        other = isinstance(value, list) or (value is None and "None" in known[name])
        if not (number or other):
            raise kind(f"{where}{key}={text}: must be a number")


def maxtext_keys() -> frozenset[str]:
    """Every setting of the installed MaxText."""
    return frozenset(_types())


@cache
def _types() -> dict[str, str]:
    """The settings, each with its type: the fields of types.py, and what else base.yml has."""
    fields = (maxtext_configs() / "types.py").read_text(encoding="utf-8")
    return dict.fromkeys(maxtext_defaults(), "") | dict(
        re.findall(r"^  ([a-zA-Z_]\w*): ([^=\n]+)", fields, re.MULTILINE)
    )
