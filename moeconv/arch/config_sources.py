"""The sources of a model's config: config file, sidecar and flags, resolved to one mapping.

Keys are MaxText's own (`rope_max_timescale`, `num_experts_per_tok`, …) plus the three token ids.
Flags win over a config file; a config file replaces the run's sidecar. Keys that a config file
leaves out have the values MaxText would give them: those of `model_name`'s file in configs/models,
then those of configs/base.yml.
"""

import difflib
import itertools
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeconv.arch.config_file import ConfigFile, load_config_file
from moeconv.arch.defaults import SCALED_KEYS, TOKEN_IDS, known_keys, maxtext_defaults
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.keys import keys, unknown_keys
from moeconv.arch.values import disagreement, plain
from moeconv.arch.yaml_file import read_yaml, short
from moeconv.errors import ConfigError

# A further pair within what may be one value.
_INNER = re.compile(r"[\s;,&|]([A-Za-z_][\w.]*)\s*=(?!=)", re.ASCII)
_PAIR = re.compile(r"[A-Za-z_][\w.]*\s*=", re.ASCII)
# One of the environment; MaxText takes a setting from M_ and its name (configs/pyconfig.py).
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")

# How alike two names must be for one to be the other misspelt; no key of MaxText 0.1.0 to 0.2.5 is.
_MISSPELT = 0.85
# Keys that no supported MaxText has: what other releases and forks have are dozens.
_FOREIGN_LIMIT = 1000


@dataclass(frozen=True)
class ConfigEntry:
    """One value of a config and its source.

    Attributes:
        value: As MaxText understands it.
        provenance: Its source.
        unread: What it is where MaxText did not read the model's file that gives it.
    """

    value: Any
    provenance: Provenance
    unread: "ConfigEntry | None" = None

    @property
    def explicit(self) -> bool:
        """Returns True if it was written for this run, so that it may contradict the shapes."""
        return self.provenance.origin not in (Origin.DEFAULT, Origin.MODEL)

    @property
    def is_default(self) -> bool:
        """Returns True if only MaxText's base.yml gives it."""
        return self.provenance.origin is Origin.DEFAULT


class ResolvedConfig(Mapping[str, ConfigEntry]):
    """A config of all sources, by MaxText key; later layers win.

    Attributes:
        ignored: What flags said that decides nothing.
        accepted: Unknown settings of the config, which the user says decide nothing.
    """

    def __init__(
        self,
        *layers: Mapping[str, ConfigEntry],
        ignored: Sequence[str] = (),
        accepted: Sequence[str] = (),
    ) -> None:
        self._values: dict[str, ConfigEntry] = {}
        for layer in layers:
            self._values.update(layer)
        self.ignored, self.accepted = tuple(ignored), tuple(accepted)

    def __getitem__(self, key: str) -> ConfigEntry:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def without(self, of: Callable[[str], bool]) -> "ResolvedConfig":
        """All but the keys of which this is true."""
        kept = {key: entry for key, entry in self._values.items() if not of(key)}
        return ResolvedConfig(kept, ignored=self.ignored, accepted=self.accepted)

    def neutral(self, names: Collection[str]) -> "ResolvedConfig":
        """This config with some settings at the value at which they change no model."""
        found = {
            name: replace(self[name], value=keys()[name].neutral[0])
            for name in names
            if name in self
        }
        return ResolvedConfig(self, found, ignored=self.ignored, accepted=self.accepted)

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return self._values[key].value if key in self._values else default


def from_flags(sets: Sequence[str]) -> ResolvedConfig:
    """Reads `--set key=value`; values are YAML scalars, as on MaxText's command line.

    One may be a whole command line of MaxText. Settings that decide nothing of a conversion are
    left out and listed. A `model_name` makes it a config: what is not given has MaxText's defaults,
    and before them what the model's file says.

    Raises:
        ConfigError: A pair without `=`, an unreadable value, a setting that MaxText has not, or a
            model that MaxText does not ship.
    """
    entries: dict[str, ConfigEntry] = {}
    ignored: list[str] = []
    for pair in (pair for text in sets for pair in _pairs(text, ignored)):
        key, _, text = pair.partition("=")
        key = key.strip()
        if key not in known_keys():
            if key not in keys():
                check_spelling({key: text}, "--set")
                raise ConfigError(
                    f"--set {short(key)}: MaxText has no such setting; see `moeconv inspect` for "
                    "those that decide a conversion"
                )
            ignored.append(key)
            continue
        try:
            value = plain(read_yaml(text))
        except ValueError as error:
            raise ConfigError(
                f"--set {key}: {short(repr(text))} is not a YAML value ({error})"
            ) from None
        entries[key] = ConfigEntry(value, Provenance(Origin.FLAG, f"--set {short(pair)}"))
    if "model_name" in entries:
        entries = {**_defaults(), **_model(entries["model_name"].value, "--set"), **entries}
    return ResolvedConfig(entries, ignored=ignored)


def flag_texts(sets: Sequence[str]) -> dict[str, str]:
    """Every setting that `--set` gives, as text: those too that decide nothing of most conversions.

    Raises:
        ConfigError: As `from_flags`.
    """
    pairs = (pair.partition("=") for text in sets for pair in _pairs(text, []))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _pairs(text: str, ignored: list[str]) -> list[str]:
    """The `key=value` pairs of one `--set`: itself, or the words of MaxText's command line.

    Raises:
        ConfigError: It is neither, or a command line that names a config file of its own.
    """
    text = re.sub(r"\\\r?\n", " ", text)  # a line that goes on, as pasted
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is a value's
        words = []
    variables = list(itertools.takewhile(_VARIABLE.match, words))
    given = [_of_variable(word) for word in variables]
    command = words[len(variables) :]
    if variables and (not _PAIR.match(command[0]) if command else all(given)):
        ignored.extend(w for w, pair in zip(variables, given, strict=True) if pair is None)
        more = _pairs(shlex.join(command), ignored) if command else []
        return [pair for pair in given if pair] + more
    first = next((n for n, word in enumerate(words) if _PAIR.match(word)), len(words))
    if (len(words) - first > 1 and all(_PAIR.match(word) for word in words[first:])) or first > 0:
        for word in words[:first]:
            if word.endswith((".yml", ".yaml")) and Path(word).name != "base.yml":
                raise ConfigError(
                    f"--set: the command line builds on {short(word)}; give that file with "
                    "--config, and the rest with --set"
                )
        if words[first:]:
            ignored.extend(words[:first])
            return words[first:]
    if not _PAIR.match(text.strip()):
        raise ConfigError(f"--set {short(repr(text))} is not of the form key=value")
    # A command line with more in it than such pairs must not lose what follows its first one.
    inner = _INNER.findall(text.partition("=")[2])
    if lost := [name for name in inner if name in keys() or name in known_keys()]:
        raise ConfigError(
            f"--set {short(repr(text))}: {lost[0]} would be lost; quote values with spaces, and "
            "leave out what is not key=value"
        )
    return [text]


def _of_variable(word: str) -> str | None:
    """The pair that MaxText reads from a variable of the environment; None where it reads none."""
    name, _, value = word.partition("=")
    key = name.removeprefix("M_").lower()
    return f"{key}={value}" if name.startswith("M_") and key in keys() else None


def resolve_config(
    content: Mapping[str, Any] | None,
    provenance: Provenance,
    sets: Sequence[str],
    accept: Collection[str] = (),
) -> ResolvedConfig:
    """A config as MaxText would resolve it, with flags over it.

    Args:
        content: A YAML's or a sidecar's config; None where there is none.
        provenance: Where it stands.
        sets: `key=value` flags. A `model_name` among them replaces the config's own.
        accept: Settings of the config that no known MaxText has, and that decide nothing.

    Raises:
        ConfigError: As `from_flags` and `from_mapping`.
    """
    flags = from_flags(sets)
    if content is None:
        return flags
    if "model_name" in flags:
        named = {**content, "model_name": flags["model_name"].value}
        content = replace(content, settings=named) if isinstance(content, ConfigFile) else named
    explicit = {key: entry for key, entry in flags.items() if entry.explicit}
    accepted = sorted(set(accept) & content.keys() - keys().keys())
    return ResolvedConfig(
        from_mapping(content, provenance, accept),
        explicit,
        ignored=flags.ignored,
        accepted=accepted,
    )


def check_spelling(content: Mapping[Any, Any], where: str, accept: Collection[str] = ()) -> None:
    """Refuses a key that nearly decides a conversion; what other releases know is let pass.

    Raises:
        ConfigError: Names the key, and the one that is meant; or nearly all keys are foreign.
    """
    names = known_keys()
    known = names | keys().keys() | set(accept)
    foreign = [key for key in map(str, content) if key not in known]
    if len(foreign) > _FOREIGN_LIMIT:
        raise ConfigError(
            f"{where}: holds {len(foreign)} keys that no MaxText has ({short(foreign[0])}, …), so "
            "it is no MaxText config"
        )
    for key in foreign:
        plain = key.strip().lower().replace("-", "_").replace(" ", "_")
        if near := difflib.get_close_matches(plain, names, 1, _MISSPELT):
            raise ConfigError(
                f"{where}: MaxText has no {short(key)}; did you mean {near[0]}? If it is another "
                f"setting, which does not change the model, pass --accept-key {short(key)}"
            )


def from_config_file(path: Path) -> dict[str, ConfigEntry]:
    """Reads any MaxText YAML: a run's own (`base_config` is followed), or a resolved config.

    Raises:
        ConfigError: The file or the one it builds on cannot be read or is no YAML mapping, or it
            names a model that MaxText does not ship.
    """
    return from_mapping(load_config_file(path), Provenance(Origin.CONFIG, str(path)))


def from_mapping(
    content: Mapping[str, Any], provenance: Provenance, accept: Collection[str] = ()
) -> dict[str, ConfigEntry]:
    """Puts a config over MaxText's defaults, and the model file it names over both.

    Of a part of a resolved config, such as a log that is cut, nothing is filled in.

    In a YAML file `model_name` wins over the file's own keys, as in MaxText (configs/pyconfig.py
    `_initialize_pydantic` merges base, model, command line in that order); a resolved config,
    known by its derived keys, already holds the outcome.

    Raises:
        ConfigError: A key is misspelt, or of no MaxText that is known and not in `accept`, or it
            names a model that MaxText does not ship.
    """
    check_spelling(content, provenance.detail, accept)
    if unknown := unknown_keys({str(key) for key in content} - set(TOKEN_IDS), accept):
        if isinstance(content, ConfigFile) and len(unknown) == len(content):
            raise ConfigError(
                f"{provenance.detail} has no setting of MaxText (it has "
                f"{', '.join(short(key) for key in unknown[:5])}), so it is no config of MaxText; "
                "give the run's YAML or log"
            )
        listed = ", ".join(short(key) for key in unknown[:20])
        raise ConfigError(
            f"{provenance.detail}: moeconv does not know {listed}"
            f"{f' and {len(unknown) - 20} more' if len(unknown) > 20 else ''}, of a newer MaxText "
            "or a fork, and cannot say whether that changes the model; for each that does not, "
            "pass --accept-key KEY"
        )
    where = content.where if isinstance(content, ConfigFile) else {}
    said = {
        str(key): ConfigEntry(
            plain(value), Provenance(provenance.origin, where.get(key, provenance.detail))
        )
        for key, value in content.items()
        if key in known_keys()
    }
    for key, entry in said.items():
        if isinstance(entry.value, str) and "${" in entry.value:
            raise ConfigError(
                f"{key}={short(entry.value)} ({entry.provenance}) refers to another value, which "
                "MaxText fills in at its start; write the value itself"
            )
    if isinstance(content, ConfigFile):
        for key in content.twice:
            if conflict := disagreement(key, *content.twice[key]):
                raise ConfigError(
                    f"{conflict}, as in a log of two runs; give the part of the run that is "
                    "converted"
                )
        if not content.whole:
            return said
    if any(key in content for key in SCALED_KEYS):
        # Not what every release has: where such a setting is missing, a line was lost.
        lost = isinstance(content, ConfigFile) and content.resolved
        left = maxtext_defaults()["always"] if lost else ()
        return {k: entry for k, entry in _defaults().items() if k not in left} | said
    below = _defaults() | said
    if isinstance(content, ConfigFile) and content.model is not None:
        check_spelling(content.model, provenance.detail, accept)
        place = Provenance(Origin.MODEL, f"the models/ beside {provenance.detail}")
        own = {key: ConfigEntry(plain(value), place) for key, value in content.model.items()}
        return below | {key: entry for key, entry in own.items() if key in known_keys()}
    model = _model(content.get("model_name"), provenance.detail)
    return below | {key: replace(entry, unread=below.get(key)) for key, entry in model.items()}


def _defaults() -> dict[str, ConfigEntry]:
    """MaxText's own."""
    defaults = maxtext_defaults()
    versions = defaults["maxtext_versions"]
    where = Provenance(Origin.DEFAULT, f"base.yml, {versions[0]} to {versions[-1]}")
    return {key: ConfigEntry(value, where) for key, value in defaults["base"].items()}


def _model(name: Any, where: str) -> dict[str, ConfigEntry]:
    """What the file of a model says; nothing for the default one.

    Raises:
        ConfigError: MaxText ships no such model.
    """
    models = maxtext_defaults()["models"]
    name = str(name or "default").replace("-Instruct", "")
    if name == "default":
        return {}
    if name not in models:
        raise ConfigError(
            f"{where}: model_name {short(repr(name))} is none of MaxText's models that moeconv "
            f"knows ({', '.join(sorted(models))}); give the run's resolved "
            "config instead"
        )
    provenance = Provenance(Origin.MODEL, f"configs/models/{name}.yml")
    return {key: ConfigEntry(value, provenance) for key, value in models[name].items()}
