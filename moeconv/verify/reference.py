"""The MaxText config that the reference is built from: the run's own where there is one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.layout import Layout, Stacking
from moeconv.arch.parameters import LayerKind
from moeconv.arch.sidecar import SIDECAR_NAME
from moeconv.arch.told import Told, from_mapping, load_config_file
from moeconv.convert.source import find_sidecar
from moeconv.orbax.locate import Step
from moeconv.verify.outcome import Check, Level, Status


@dataclass(frozen=True)
class ReferenceConfig:
    """MaxText keys and who told them.

    Attributes:
        keys: For `MaxTextModel.load`.
        origin: For people.
        independent: Whether they were told by somebody else than the conversion: a reference built
            from what the conversion believed cannot find out that it was told wrong.
        told: Where they are independent: the same with MaxText's defaults, as convert reads them.
    """

    keys: Mapping[str, Any]
    origin: str
    independent: bool
    told: Mapping[str, Told] = field(default_factory=dict)


def reference_config(
    model: ModelDescription, layout: Layout, step: Step, config: Path | None
) -> ReferenceConfig:
    """The config of the run.

    Args:
        model: The model that the manifest claims.
        layout: How the checkpoint stores it.
        step: The checkpoint.
        config: A MaxText YAML given by the user; sizes that it leaves out come from the shapes.

    Raises:
        ConfigError: The user's file or the run's sidecar cannot be read.
    """
    if config is not None:
        keys = load_config_file(config)
        told = from_mapping(keys, Provenance(Origin.CONFIG, str(config)))
        return ReferenceConfig({**_sizes(model, layout), **keys}, str(config), True, told)
    if (sidecar := find_sidecar(step, needed=True)) is not None:
        keys, folder = sidecar[0].config, sidecar[1]
        told = from_mapping(keys, Provenance(Origin.SIDECAR, str(folder / SIDECAR_NAME)))
        return ReferenceConfig(keys, f"the run's sidecar in {folder}", True, told)
    keys = {**_sizes(model, layout), **_semantics(model)}
    return ReferenceConfig(keys, "the description in the output's manifest", False)


def reference_check(level: Level, name: str, *, side: str, origin: str, independent: bool) -> Check:
    """What a level compared with.

    Args:
        level: The level.
        name: The model's name.
        side: `maxtext` or `hf`.
        origin: See `ReferenceConfig`.
        independent: See `ReferenceConfig`; a warning where it is not.
    """
    summary = f"{name}, by {origin}"
    if not independent:
        summary += (
            ": what the conversion was told wrong (rope_theta, say) is wrong there too and cannot "
            "be found; give the run's own config with --config"
        )
    return Check(
        level=level,
        name="reference",
        status=Status.PASS if independent else Status.WARN,
        summary=summary,
        metrics={"against": side, "config": origin, "independent": independent},
    )


def _sizes(model: ModelDescription, layout: Layout) -> dict[str, Any]:
    """What the shapes say, as MaxText's keys."""
    dense, moe = model.intermediate_size, model.moe_intermediate_size
    keys: dict[str, Any] = {
        "base_emb_dim": model.hidden_size,
        "base_num_query_heads": model.num_attention_heads,
        "base_num_kv_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "base_num_decoder_layers": model.num_hidden_layers,
        "base_mlp_dim": dense or moe,
        "vocab_size": model.vocab_size,
        "logits_via_embedding": model.tie_word_embeddings,
        "max_target_length": model.max_position_embeddings,
        "decoder_block": model.decoder_block,
        "scan_layers": layout.stacking is not Stacking.UNSCANNED,
    }
    if layout.scan_axis is not None:
        keys["param_scan_axis"] = layout.scan_axis
    if model.num_experts:
        keys |= {"num_experts": model.num_experts, "base_moe_mlp_dim": moe}
    if model.decoder_block == "envy":
        step = model.layer_kinds.index(LayerKind.MOE) + 1 if model.moe_layers else 0
        keys |= {
            "interleave_moe_layer_step": step,
            "inhomogeneous_layer_cycle_interval": layout.cycle if layout.cycle > 1 else step,
            # Shapes say so too: neither has parameters in any checkpoint that is converted.
            "use_qk_norm": False,
            "use_post_ffw_norm": False,
        }
    return keys


def _semantics(model: ModelDescription) -> dict[str, Any]:
    """What shapes cannot say, as the conversion understood it."""
    keys: dict[str, Any] = {
        "normalize_embedding_logits": model.normalize_embedding_logits,
        "rope_type": model.rope_type,
        "rope_max_timescale": model.rope_theta,
        "rope_use_scale": model.rope_use_scale,
        "normalization_layer_epsilon": model.rms_norm_eps,
    }
    if model.num_experts_per_tok:
        keys["num_experts_per_tok"] = model.num_experts_per_tok
    return keys
