"""A LoRA adapter in a checkpoint: its factors by the parameter they change, its rank and alpha.

    kernel_lora_a, kernel_lora_b     qwix, in the layout of the parameters (`params.params`) or as
                                     an NNX state (trainers of post-training)
    lora_a.kernel, lora_b.kernel     the decode server's (utils/lora_utils.py), with an
                                     `adapter_config.json` beside its step

Rank and alpha are in the step's metadata (common/checkpointing.py `save_checkpoint`), in that file,
or in the run's config, as `lora` or (releases before it) as `lora_rank` and `lora_alpha`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.arch.config_sources import ResolvedConfig
from moeconv.arch.yaml_file import short
from moeconv.errors import ConfigError, NotACheckpointError, TensorError
from moeconv.orbax.locate import Step, read_beside
from moeconv.orbax.trees import KeyPath
from moeconv.tensor.stored import ArrayInfo
from moeconv.untrusted import strict_json

_NAME = re.compile(r"(?:(?P<of>.+)_)?lora_(?P<side>[ab])(?:\.(?P<leaf>.+))?\Z")
ADAPTER_CONFIG = "adapter_config.json"
_LIMIT = 2**20

Factors = Mapping[KeyPath, tuple[ArrayInfo, ArrayInfo]]


@dataclass(frozen=True)
class Strength:
    """How much of the product is added: `alpha / rank`.

    Attributes:
        rank: Of all factors.
        alpha: As it was trained with.
        source: Where alpha is from.
        quantised: The type to which the base was quantised while training; None where it was not.
    """

    rank: int
    alpha: float
    source: str
    quantised: str | None = None

    @property
    def scale(self) -> float:
        """What the product is multiplied by (qwix `LoraProvider.dot_general`)."""
        return self.alpha / self.rank


def factors_of(arrays: Mapping[str, ArrayInfo]) -> Factors:
    """The two factors of each parameter, by its key path.

    Raises:
        TensorError: One lacks the other.
    """
    found: dict[KeyPath, dict[str, ArrayInfo]] = {}
    for info in arrays.values():
        path, side = _changed(info.path)
        found.setdefault(path, {})[side] = info
    if odd := [info.name for pair in found.values() if len(pair) == 1 for info in pair.values()]:
        raise TensorError(f"{odd[0]} is one factor of a LoRA adapter, and the other is not there")
    return {path: (pair["a"], pair["b"]) for path, pair in found.items()}


def _changed(path: KeyPath) -> tuple[KeyPath, str]:
    """The parameter that a factor changes, and which factor it is."""
    if match := _NAME.match(path[-1]):
        return (*path[:-1], match["of"] or match["leaf"] or "kernel"), match["side"]
    match = _NAME.match(path[-2])
    assert match is not None  # `orbax.trees.is_adapter`
    return (*path[:-2], path[-1]), match["side"]


def strength_of(step: Step, resolved: ResolvedConfig, ranks: Mapping[str, int]) -> Strength:
    """Rank and alpha of an adapter.

    Args:
        step: Its step.
        resolved: The run's config and flags; `lora` in it, or `lora_alpha`.
        ranks: Rank of each pair of factors, by the name of what they change.

    Raises:
        ConfigError: Alpha is not recorded, is no number, or the rank recorded is not the factors'.
        TensorError: Factors have several ranks, of which MaxText trains one.
    """
    ordered = sorted((rank, name) for name, rank in ranks.items())
    (rank, one), (most, other) = ordered[0], ordered[-1]
    if rank != most:
        raise TensorError(
            f"the adapter has rank {rank} for {one} and {most} for {other}; MaxText scales by one "
            "rank, so it is unclear by which"
        )
    for content, where in recorded(step, resolved):
        said = content.get("lora_rank", content.get("r"))
        alpha = content.get("lora_alpha")
        if said not in (None, 0, rank):
            raise ConfigError(
                f"{where} says rank {short(said)}, but the factors have rank {rank}; give the "
                "config of this run"
            )
        if alpha is None:
            continue
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < 1e9:
            raise ConfigError(f"lora_alpha={short(alpha)} ({where}) should be a number from 0")
        kind = content.get("lora_weight_qtype")
        return Strength(rank, float(alpha), where, str(kind) if kind else None)
    raise ConfigError(
        f"{step.items} does not record the alpha of its adapter of rank {rank}; give it with "
        "--set lora_alpha=ALPHA, or the run's config with --config"
    )


def recorded(step: Step, resolved: ResolvedConfig) -> list[tuple[Mapping[str, Any], str]]:
    """What says something of the adapter's rank and alpha, and where it stands: a flag first."""
    found: list[tuple[Mapping[str, Any], str]] = []
    flat = {key: resolved[key] for key in ("lora_rank", "lora_alpha") if key in resolved}
    if said := {key: entry.value for key, entry in flat.items() if entry.explicit}:
        where = next(entry.provenance for entry in flat.values() if entry.explicit)
        found.append((said, f"lora_rank and lora_alpha ({where})"))
    entry = resolved.get("lora")
    if entry is not None and isinstance(entry.value, dict) and entry.value.get("lora_rank"):
        found.append((entry.value, f"lora ({entry.provenance})"))
    if step.lora:
        found.append((step.lora, f"the metadata of {step.folder}"))
    for folder in step.beside:
        raw = read_beside(folder, ADAPTER_CONFIG, limit=_LIMIT)
        if raw is None:
            continue
        try:
            content = strict_json.loads(raw)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise NotACheckpointError(f"{folder / ADAPTER_CONFIG} is no JSON object")
        found.append((content, str(folder / ADAPTER_CONFIG)))
    return found
