"""What a run is beyond its MaxText config, as far as the checks need it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moeconv.errors import UsageError


@dataclass(frozen=True)
class RunSettings:
    """Everything may be None: what is not known is not checked, and the report says so.

    Attributes:
        dataset: Hub id (`owner/name`) or local path of the raw dataset; None once it is prepared.
        tokenizer: Hub id or local directory of the tokenizer.
        tokenizer_size: How many ids the tokenizer has, its special tokens counted.
        pad_id: The id that MaxText's pipeline takes for padding (negative: none).
        batches: Training batches that the data holds for all epochs together.
        loss_scaling: Whether the trainer scales the loss.
        own_pipeline: Whether the data are fed by moeconv's own reader, which masks by segments
            and not by the pad id.
        hub_repo: Where the model is to be pushed in the end.
        wandb: Whether the run is to be logged to Weights & Biases.
        state_bytes: Size of the train state, where the caller knows it already.
        data_bytes: About what the data that are still to be prepared take on the same disk.
    """

    dataset: str | None = None
    tokenizer: str | None = None
    tokenizer_size: int | None = None
    pad_id: int | None = None
    batches: int | None = None
    loss_scaling: bool = True
    own_pipeline: bool = False
    hub_repo: str | None = None
    wandb: bool = True
    state_bytes: int | None = None
    data_bytes: int | None = 0
    # Arguments of patches.trainer: what the trainer changes in MaxText while it traces the step.
    patches: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: "RunSettings | Mapping[str, Any]") -> "RunSettings":
        """Reads a mapping, keys as the fields above.

        Raises:
            UsageError: A key that is none of them.
        """
        if isinstance(given, RunSettings):
            return given
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise UsageError(f"preflight knows no setting {unknown[0]!r}; it takes {names}")
        return cls(**given)
