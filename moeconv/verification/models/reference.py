"""The MaxText config that the reference is built from: the run's own where there is one.

It is resolved by the functions that convert uses (`arch.config_sources`, `arch.resolve`), and
MaxText is given the outcome: a YAML has one meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moeconv.arch.config_sources import ConfigEntry, ResolvedConfig, resolve_config
from moeconv.arch.defaults import CHANGED, SCALED_KEYS, known_keys
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import FIELDS
from moeconv.arch.layout import Layout
from moeconv.arch.model_keys import semantic_keys, size_keys
from moeconv.arch.resolve import Resolution, resolve
from moeconv.maxtext.checkpoint import LORA, find_sidecar
from moeconv.maxtext.run_config import run_config
from moeconv.orbax.locate import Step

_NAMES = {"decoder_block": "decoder_block", **{field.key: field.name for field in FIELDS}}


@dataclass(frozen=True)
class ReferenceConfig:
    """The sources of the run's config.

    Attributes:
        model: The model that the manifest claims.
        layout: How the checkpoint stores it.
        step: The checkpoint.
        content: The run's config as it is written; None where only the manifest describes the run.
        resolved: The same with MaxText's defaults.
        origin: For people.
    """

    model: ModelDescription
    layout: Layout
    step: Step
    content: Mapping[str, Any] | None
    resolved: ResolvedConfig
    origin: str

    @property
    def independent(self) -> bool:
        """True if the config comes from the run and not from the conversion.

        A reference built from what the conversion was given cannot show that it was given a wrong
        value.
        """
        return self.content is not None

    @property
    def unsaid(self) -> Mapping[str, Any]:
        """Fields that the config leaves to a default which may not have been the run's.

        The reference has the manifest's values there.
        """
        keys = {"decoder_block", *(CHANGED if not self.step.dated else ())}
        return {_NAMES[k]: self.resolved[k].value for k in keys if self.resolved[k].is_default}

    @cached_property
    def resolution(self) -> Resolution:
        """The run's model, by the config and the checkpoint's shapes.

        Raises:
            MoeconvError: The config is not of this checkpoint's model.
        """
        own = {
            key: ConfigEntry(getattr(self.model, name), self.resolved[key].provenance)
            for key, name in _NAMES.items()
            if name in self.unsaid
        }
        resolved = ResolvedConfig(self.resolved, own)
        return resolve(self.layout, resolved, scan_layers=self.step.scan_layers)

    @cached_property
    def keys(self) -> Mapping[str, Any]:
        """For `MaxTextModel.load`: sizes by the shapes, once, and all else as resolved.

        Raises:
            MoeconvError: The config is not of this checkpoint's model.
        """
        if self.content is None:
            return {
                **size_keys(self.model, self.layout),
                **semantic_keys(self.model, self.layout.block),
            }
        decided = known_keys() | SCALED_KEYS.keys()
        others = {key: value for key, value in self.content.items() if key not in decided}
        decisive = {key: one.value for key, one in self.resolved.items() if key not in SCALED_KEYS}
        run = self.resolution.model()
        return {
            **others,
            **decisive,
            **size_keys(run, self.layout),
            **semantic_keys(run, self.layout.block),
        }


def reference_config(
    model: ModelDescription,
    layout: Layout,
    step: Step,
    config: Path | None,
    accepted: Sequence[str] = (),
    *,
    merged: bool = False,
) -> ReferenceConfig:
    """The config of the run.

    Args:
        model: The model that the manifest claims.
        layout: How the checkpoint stores it.
        step: The checkpoint.
        config: A MaxText YAML given by the user, instead of the run's sidecar.
        accepted: Settings of it that are unknown and that the user accepted.
        merged: The run's LoRA adapter is merged, so that its settings decide nothing.

    Raises:
        ConfigError: The user's file or the run's sidecar cannot be read.
    """
    sidecar = find_sidecar(step, needed=True) if config is None else None
    content, provenance = run_config(config, sidecar, step)
    if config is not None:
        origin = str(config)
    elif sidecar is None and content is not None:
        origin = provenance.detail
    elif sidecar is not None:
        origin = f"the run's sidecar in {sidecar.folder}"
    else:
        origin = "the description in the output's manifest"
    resolved = resolve_config(content, provenance, (), accepted)
    if merged:
        resolved = resolved.neutral(LORA)
    return ReferenceConfig(model, layout, step, content, resolved, origin)
