"""A run's config: what the user gives, the run's sidecar, or what is found in the run's directory.

Looked for beside the checkpoint, in its step, its `checkpoints/` and its run, in this order: logs
(`*.log`, `*.out`, `*.err`, `*.txt`, JSON, also rotated and packed) that hold MaxText's settings;
W&B's `wandb/*run*/files/config.yaml`; a YAML that holds a resolved config. All of them must agree.
A YAML that a run was started with is not taken unasked, since the command line and the release's
defaults belong to it.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv.arch.config_file import ConfigFile, load_config_file, read_found
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.values import disagreement
from moeconv.errors import ConfigError
from moeconv.maxtext.sidecar import METRICS_NAME, SIDECAR_NAMES, FoundSidecar
from moeconv.orbax.locate import Step

_LOGS = {".log", ".out", ".err", ".txt", ".json", ".jsonl"}
_OTHERS = {METRICS_NAME, *SIDECAR_NAMES}
_YAML = (".yml", ".yaml")
# Files of each kind that are looked at; a run directory holds few.
_MOST = 20


def run_config(
    config: Path | None, sidecar: FoundSidecar | None, step: Step | None = None
) -> tuple[Mapping[str, Any] | None, Provenance]:
    """A run's config and its source, for `resolve_config`.

    Args:
        config: The user's file, which is taken first.
        sidecar: The run's.
        step: Where else to look, if there is neither.

    Raises:
        ConfigError: The user's file cannot be read, or two files of the run contradict each other.
    """
    if config is not None:
        return load_config_file(config), Provenance(Origin.CONFIG, str(config))
    if sidecar is not None:
        where = Provenance(Origin.SIDECAR, sidecar.path)
        return sidecar.content.config, where
    if step is not None and (found := _found(step)) is not None:
        path, content = found
        return content, Provenance(Origin.CONFIG, str(path))
    return None, Provenance(Origin.FLAG, "")


def said_of(
    content: Mapping[str, Any] | None, provenance: Provenance, *, given: bool
) -> Iterator[str]:
    """What the user should know of where the config comes from.

    Args:
        content: From `run_config`.
        provenance: Likewise.
        given: True if the user named the file.
    """
    if not isinstance(content, ConfigFile):
        return
    if not given:
        yield (
            f"the settings are those of {provenance.detail} ({content.kind}), which was found with "
            "the checkpoint; --config gives another file"
        )
    yield from content.notes
    if not content.whole:
        yield (
            f"{provenance.detail} has {len(content)} settings, a part of {content.kind}; those "
            "that it does not have are not taken to be MaxText's defaults"
        )


def _found(step: Step) -> tuple[Path, ConfigFile] | None:
    """A resolved config beside a step on this machine, which all others there agree with."""
    folders = [folder.local for folder in step.beside if folder.local is not None]
    groups = [
        [
            (folder / name, content)
            for name in sorted(kind(folder))[:_MOST]
            if (content := read_found(folder, name)) is not None
        ]
        for kind in (_logs, _wandb, _yamls)
        for folder in folders
    ]
    taken = next((each[-1] for group in groups if (each := [f for f in group if f[1].whole])), None)
    if taken is not None:
        for other in itertools.chain.from_iterable(groups):
            _demand_equal(taken, other)
    return taken


def _demand_equal(one: tuple[Path, ConfigFile], other: tuple[Path, ConfigFile]) -> None:
    """Refuses files of a run that are of different models."""
    for key in sorted(one[1].keys() & other[1].keys()):
        said = [(file[key], file.where.get(key, str(path))) for path, file in (one, other)]
        if conflict := disagreement(key, said[0], said[1]):
            raise ConfigError(
                f"{conflict}, and both files hold the settings of this run; give that of this run "
                "with --config"
            )


def _logs(folder: Path) -> Iterator[str]:
    """Also `train.log.1` and `train.log.gz`."""
    return (n for n in _names(folder) if _LOGS & {*Path(n).suffixes} and n not in _OTHERS)


def _yamls(folder: Path) -> Iterator[str]:
    return (name for name in _names(folder) if name.endswith(_YAML))


def _wandb(folder: Path) -> Iterator[str]:
    runs = (name for name in _names(folder / "wandb") if "run" in name)
    return (f"wandb/{name}/files/config.yaml" for name in runs)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []
