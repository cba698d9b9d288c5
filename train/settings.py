"""What a run is beyond its MaxText config: `<recipe>.run.yml` beside `<recipe>.yml`, and `run.…=`.

MaxText has no word for epochs, a loss scale, or where the model goes in the end; its own keys stay
in its own file, which stock MaxText accepts.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from moeconv_train.data.manifest import PrepareOptions, StoryOptions
from moeconv_train.loss_scaling import LossScaleSettings
from moeconv_train.preflight.config import value_of
from moeconv_train.tokenizer import EMBEDDED as EMBEDDED
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moeconv.errors import ConfigError, MoeconvError, UsageError

PREFIX = "run."
# What a run file says of a license, and the settings that name something else on the command line.
_LICENSES = {
    "tokenizer_license": {"run.data.tokenizer", "run.data.directory", "tokenizer_path"},
    "data_license": {
        *("run.data.source", "run.data.directory", "dataset_type"),
        *("hf_path", "hf_train_files", "grain_train_files"),
    },
}

# Arguments of preflight/patches.py.
Patch = Annotated[str, Field(pattern="^(fp16_head|expert_tiles|attention_blocks)$")]

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def seconds_of(text: Any) -> Any:
    """`8h30m`, `45m`, `90s` or a number of seconds, as seconds.

    Raises:
        ValueError: It is none of these.
    """
    if not isinstance(text, str):
        return text
    found = _DURATION.fullmatch(text)
    if not (found and found[0]):
        raise ValueError(f"{text!r} is no duration such as 8h30m, 45m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(3600 * hours + 60 * minutes + seconds)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSettings(StoryOptions):
    """What the rows are made of; see `moeconv data prepare` for all but the first two."""

    source: str | None = Field(
        None,
        description="Dataset on the Hub, a local file or folder, or `embedded`. Without it, and "
        "without a directory, MaxText's own data settings count.",
    )
    directory: str | None = Field(
        None, description="Where the prepared rows lie or shall lie; default below the output."
    )

    def options(self, sequence_length: int) -> PrepareOptions:
        """These, as preparing takes them."""
        kept = self.model_dump(exclude={"source", "directory"})
        return PrepareOptions(sequence_length=sequence_length, **kept)


class WandbSettings(_Section):
    """Weights & Biases; the key comes from the environment (WANDB_API_KEY)."""

    enabled: bool = False
    entity: str | None = None
    project: str = "moeconv"
    name: str | None = Field(None, description="Default: the run's name.")


class RunFile(_Section):
    """The whole of `<recipe>.run.yml`."""

    epochs: int | None = Field(
        None, ge=1, description="Steps are counted so that every row is read this often."
    )
    evaluations_per_epoch: int = Field(1, ge=0, description="Of the whole validation split.")
    time_limit: Annotated[float | None, BeforeValidator(seconds_of)] = Field(
        None, gt=0, description="Saves and leaves after this long, such as 8h30m."
    )
    data: DataSettings = DataSettings()
    loss_scale: LossScaleSettings = LossScaleSettings()
    patches: dict[Patch, bool] = Field({}, description="How MaxText's step is computed.")
    wandb: WandbSettings = WandbSettings()
    hub_repo: str | None = Field(None, description="Where `moeconv push` is to bring the model.")
    language: str | None = None
    license: str | None = Field(None, description="Of the model, a Hub id.")
    tokenizer_license: str | None = Field(None, description="By its name, for the model card.")
    data_license: str | None = Field(None, description="By its name, for the model card.")


def run_file_of(config: Path) -> Path:
    """The place of a config's run file."""
    return config.with_name(f"{config.stem}.run.yml")


def read_settings(
    file: Path | None, overrides: Mapping[str, str], given: Collection[str] = ()
) -> RunFile:
    """The run file, if there is one, with the command line's `run.…=value` over it.

    `given` are the names of MaxText's own settings there, which may replace what has a license.

    Raises:
        ConfigError: The file is not YAML, or a field of it is wrong.
        UsageError: A field of `overrides` is wrong.
    """
    content = read_yaml(file) if file else {}
    _validate(content, f"{file}: ", ConfigError)
    for name, others in _LICENSES.items():
        if others & {*overrides, *given}:
            content.pop(name, None)
    for key, text in overrides.items():
        *sections, name = key.removeprefix(PREFIX).split(".")
        inner = content
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[name] = value_of(text)
    return _validate(content, PREFIX, UsageError)


def read_yaml(file: Path) -> dict[str, Any]:
    """Settings of a file.

    Raises:
        ConfigError: It cannot be read, or has no settings.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: cannot be read as YAML ({reason})") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file}: must be settings with values, such as `epochs: 2`")
    return content or {}


def _validate(content: Mapping[str, Any], where: str, kind: type[MoeconvError]) -> RunFile:
    filled = {key: value for key, value in content.items() if value is not None}
    try:
        return RunFile.model_validate(filled)
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = ".".join(map(str, first["loc"])).removesuffix(".[key]"), first["msg"]
        if first["type"] == "extra_forbidden":
            section: Any = RunFile
            for part in first["loc"][:-1]:
                section = section.model_fields[part].annotation
            near = nearest(str(first["loc"][-1]), section.model_fields)
            raise kind(f"{where}{name}: no such setting{near}") from None
        if first["type"] == "model_type":
            raise kind(f"{where}{name}: has fields of its own; give {name}.FIELD") from None
        reason, given = reason.removeprefix("Value error, "), repr(first["input"])
        told = reason if given in reason else f"{reason}, not {given}"
        raise kind(f"{where}{name}: {told}") from None


def nearest(name: str, names: Any) -> str:
    """`; did you mean …?`, where some name is near enough."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(sorted(names))}"
