"""Files that hold a run's config: MaxText's YAML, its own log, what W&B recorded, a sidecar."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from moeconv.arch.config_record import SIDECAR, is_record, sections, what_else
from moeconv.arch.defaults import maxtext_defaults
from moeconv.arch.keys import keys
from moeconv.arch.log_file import Value, parse, read_log
from moeconv.arch.values import disagreement
from moeconv.arch.yaml_file import SIZE_LIMIT, key_lines, read_yaml, short
from moeconv.errors import ConfigError
from moeconv.untrusted.files import is_file, open_inside, open_regular
from moeconv.untrusted.text_files import decoded

# Settings of every release, first and last of the sorted list among them, and how many a resolved
# config has at least (0.1.0 has the fewest).
_SURE = ("adam_b1", "decoder_block", "emb_dim", "num_decoder_layers", "weight_dtype")
_LEAST = 300
_LOG = "MaxText's log"
_YAML = (".yml", ".yaml")
_SIDECAR = "the sidecar of a run of moeconv"
_MOST_BASES = 20


@dataclass(frozen=True)
class ConfigFile(Mapping[str, Any]):
    """What a file says.

    Attributes:
        settings: By MaxText key.
        where: The file and line of each, where they are known.
        kind: What it is, for people.
        whole: False where settings that it does not have need not be at MaxText's defaults: a part
            of a resolved config.
        twice: Settings that it has with two values: both, each with its place.
        notes: What the user should know of how it was read, a sentence each.
        release: The MaxText that it says has trained.
        model: What the file of its model says, where that is beside it and not MaxText's own.
    """

    settings: Mapping[str, Any]
    where: Mapping[str, str] = field(default_factory=dict)
    kind: str = "YAML"
    whole: bool = True
    twice: Mapping[str, tuple[Value, Value]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    release: str | None = None
    model: Mapping[str, Any] | None = None

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
    """The keys of a MaxText YAML and of the files it builds on, of a log, or of a record.

    Raises:
        ConfigError: A file cannot be read, or is none of these.
    """
    found = _load(path, lambda: open_regular(path), ())
    if found.kind != "YAML" or found.resolved:
        return found
    return replace(found, model=_model_beside(path, found.get("model_name")))


def _model_beside(path: Path, model: Any) -> dict[str, Any] | None:
    """The file of a model that MaxText finds before its own: `models/NAME.yml` beside the YAML.

    Source: MaxText configs/pyconfig.py `_initialize_pydantic`; 0.1.0 to 0.2.5 do so.
    """
    name = f"models/{str(model or 'default').replace('-Instruct', '')}.yml"
    try:
        with open_inside(path.parent, name) as file:
            content = read_yaml(decoded(file, SIZE_LIMIT))
        if not isinstance(content or {}, dict):
            raise ValueError("it should have `key: value` lines")
        return dict(content or {})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path.parent / name}: {error}") from None


def read_found(folder: Path, name: str) -> ConfigFile | None:
    """A resolved config, or a part of one, in a folder that others may have filled; else None."""
    path = folder / name
    try:
        with open_inside(folder, name) as file:
            if path.suffix in _YAML:
                found: ConfigFile | None = _from_yaml(path, decoded(file, SIZE_LIMIT))
            else:
                found = _from_log(path, file)
    except (OSError, ValueError, ConfigError):
        return None
    return found if found is not None and (found.resolved or found.kind == _LOG) else None


def _load(path: Path, opened: Callable[[], BinaryIO], above: tuple[Path, ...]) -> ConfigFile:
    """Reads a file that the user named, or one that the files `above` name as their base."""
    try:
        with opened() as file:
            if (log := _from_log(path, file)) is not None:
                return log
            file.seek(0)
            text = decoded(file, SIZE_LIMIT)
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    except ValueError as error:  # also bytes that are no text
        raise ConfigError(
            f"--config {path} is not YAML of MaxText, and no log of it: {error}"
        ) from None
    own = _from_yaml(path, text)
    parent = own.get("base_config")
    if own.kind != "YAML" or own.resolved or not parent:
        return own
    maxtexts = Path(str(parent)).name == "base.yml"
    if maxtexts and not _is_beside(path, str(parent)):
        return own
    base = _load_base(path, str(parent), (*above, path))
    settings = _changed(base) if maxtexts else base.settings
    return ConfigFile({**settings, **own.settings}, {**base.where, **own.where})


def _is_beside(path: Path, name: str) -> bool:
    """True if MaxText reads this `base.yml`, and not its own: it is beside the YAML, or below.

    Source: MaxText configs/pyconfig.py `_load_config`.
    """
    try:
        return is_file(path.parent, name)
    except OSError:
        return False


def _changed(base: ConfigFile) -> dict[str, Any]:
    """What a copy of MaxText's base.yml says otherwise; sizes are left out, as shapes show them."""
    defaults = maxtext_defaults()["base"]
    return {
        key: value
        for key, value in base.items()
        if key not in keys()
        or (
            key in defaults
            and keys()[key].kind != "size"
            and disagreement(key, (value, ""), (defaults[key], ""))
        )
    }


def _load_base(path: Path, name: str, above: tuple[Path, ...]) -> ConfigFile:
    """What a `base_config` names, which must be beside the file that names it, or below."""
    base, folder = path.parent / name, path.parent
    of = f"--config {path}: its base_config {short(name)}"
    if len(above) > _MOST_BASES:
        raise ConfigError(f"{of} is behind {_MOST_BASES} others; put them into one file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(
            f"{of} leads out of {folder}; copy that file beside it and give its name alone"
        )
    why = ""
    try:
        there = is_file(folder, name)
        if there and base.resolve() in [each.resolve() for each in above]:
            itself = base.resolve() == path.resolve()
            circle = "is this file itself" if itself else f"builds on {path.name} in turn"
            raise ConfigError(f"{of} {circle}; remove one base_config")
    except OSError as error:  # a name that is none, a link that leads out, a FIFO
        there, why = False, f" ({short(error.strerror, 300)})"
    if not there:
        raise ConfigError(f"{of} is not at {short(base, 200)}{why}; copy it there")
    found = _load(base, lambda: open_inside(folder, name), above)
    if found.kind != "YAML":
        raise ConfigError(
            f"{of} is {found.kind}, which MaxText cannot build on; if it is of this run, give it "
            f"alone: --config {base}"
        )
    return found


def _from_log(path: Path, file: BinaryIO) -> ConfigFile | None:
    """The settings that a log has; None where it has none."""
    if (logged := read_log(file, path)) is None:
        return None
    notes = tuple(
        f"{place}: {key} is left out, as its value is cut off there, or may be; end the line if it "
        "is whole, or give it with --set"
        for key, place in logged.cut.items()
        if key in keys() and keys()[key].kind not in ("training", "machine", "io")
    )
    found = ConfigFile(logged.values, logged.where, _LOG, True, logged.twice, notes)
    return found if found.resolved else replace(found, whole=False)


def _from_yaml(path: Path, text: str) -> ConfigFile:
    """A YAML's keys, those of W&B's record, or of a sidecar.

    Raises:
        ConfigError: It is no YAML, or has no settings.
    """
    try:
        content = read_yaml(text)  # JSON is YAML
    except ValueError as error:
        log = "" if path.suffix in _YAML else "; nor a log with lines `Config param KEY: VALUE`"
        raise ConfigError(f"--config {path} is not YAML of MaxText: {error}{log}") from None
    if content is None or content == {}:
        raise ConfigError(f"--config {path} is empty, or has comments alone; it has no settings")
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds no `key: value` lines, and no lines `Config param KEY: VALUE` "
            "of a log, so it is no MaxText config; a command line is given with --set"
        )
    if content.get("format") == SIDECAR and isinstance(content.get("config"), dict):
        where = _places(path, text, ("config",))
        release = content.get("maxtext_version")
        note = (
            f"{path} is {_SIDECAR}; of it the settings alone are read. Beside the checkpoint its "
            "tokenizer and the run's facts are, too"
        )
        return ConfigFile(
            content["config"], where, _SIDECAR, notes=(note,), release=release and str(release)
        )
    if is_record(content):
        return _from_record(path, text, content)
    if (what := what_else(content)) is not None:
        raise ConfigError(
            f"--config {path} is {what}, not a config of MaxText; give the run's YAML or log"
        )
    if not content.keys() & keys().keys() and (below := list(sections(content))):
        raise ConfigError(
            f"--config {path} has MaxText's settings below {'.'.join(below[0])}, where MaxText "
            "does not read them; give a file that has them at its top"
        )
    return ConfigFile(content, _places(path, text))


def _from_record(path: Path, text: str, content: Mapping[str, Any]) -> ConfigFile:
    """What W&B recorded of a run."""
    kind = "W&B's record of the run"
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    twice: dict[str, tuple[Value, Value]] = {}
    for names, section in sections(content).items():
        places = _places(path, text, names)
        for key, recorded in section.items():
            # Programs give W&B texts where it takes no dtype or enum.
            value = parse(recorded) if isinstance(recorded, str) else recorded
            place = places.get(key, str(path))
            if key in values and values[key] != value:
                twice.setdefault(key, ((values[key], where[key]), (value, place)))
            values[key], where[key] = value, place
    if not values:
        raise ConfigError(
            f"--config {path} is {kind}, and has no setting of MaxText, which gives W&B none of "
            "them by itself; give the run's log or YAML"
        )
    found = ConfigFile(values, where, kind, True, twice)
    return found if found.resolved else replace(found, whole=False)


def _places(path: Path, text: str, names: tuple[str, ...] = ()) -> dict[str, str]:
    """The file and line of every key of a mapping."""
    return {key: f"{path}:{line}" for key, line in key_lines(text, *names).items()}
