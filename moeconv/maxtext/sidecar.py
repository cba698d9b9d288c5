"""The sidecar a run leaves beside its checkpoints, so that converting it needs no flag.

`moeconv train` writes `<run>/moeconv_run.json` before step 1. It holds the resolved MaxText
config and the place of the tokenizer, relative to itself.
"""

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeconv.arch.yaml_file import short
from moeconv.orbax.store import Folder

SIDECAR_NAME = "moeconv_run.json"
# Of moeconv 0.1.0, whose outputs have a manifest of this name as well.
OLD_SIDECAR_NAME = "moeconv.json"
SIDECAR_NAMES = (SIDECAR_NAME, OLD_SIDECAR_NAME)
METRICS_NAME = "metrics.jsonl"


class RunFacts(BaseModel):
    """What a model card says of a run, and where its model is to go; unknown keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    dataset: str | None = Field(default=None, description="Hub id of the training data")
    dataset_digest: str | None = Field(default=None, description="SHA-256 of the prepared data")
    language: str | None = Field(default=None, description="of the data, ISO 639-1")
    license: str | None = Field(default=None, description="that the model is to have, a Hub id")
    tokenizer_license: str | None = Field(default=None, description="of the run's tokenizer")
    data_license: str | None = Field(default=None, description="of the training data")
    hub_repo: str | None = Field(default=None, description="where the model is to be pushed")
    epochs: float | None = Field(default=None, allow_inf_nan=False)
    steps: int | None = Field(default=None, description="that the run is to take")
    tokens_per_step: int | None = Field(default=None, description="positions of the global batch")


class RunSidecar(BaseModel):
    """The file's schema; unknown keys are kept, so that a newer trainer may add some."""

    model_config = ConfigDict(extra="allow", frozen=True)

    format: Literal["moeconv-run"]
    version: Literal[1]
    config: dict[str, Any] = Field(description="resolved MaxText config")
    maxtext_version: str | None = None
    moeconv_version: str | None = None
    tokenizer: str | None = Field(default=None, description="directory, relative to the sidecar")
    text_sample: str | None = Field(
        default=None, description="text of the training corpus, relative to the sidecar"
    )
    run: RunFacts | None = None
    target: str | None = Field(
        default=None, description="of such a checkpoint: the page of the model's architecture"
    )
    narrowed: dict[str, Literal["bfloat16", "float16"]] = Field(
        default={},
        description="of a checkpoint made from a Hugging Face model: the dtype of the tensors that "
        "parameters became, by name, where these are wider, for a factor that they hold",
    )


class FoundSidecar(NamedTuple):
    """A sidecar and where it was found."""

    content: RunSidecar
    folder: Folder
    name: str = SIDECAR_NAME

    @property
    def path(self) -> str:
        """Its file, or its address."""
        return str(self.folder / self.name)


class MetricsLine(BaseModel):
    """One line of `<run>/metrics.jsonl`: a train step, or one evaluation; unknown keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: Literal["train", "eval"]
    step: int = Field(description="steps completed when it was measured")
    loss: float = Field(description="mean cross entropy per target token, in nats, nothing added")
    tokens: int | None = Field(default=None, description="target tokens trained on so far")
    total_loss: float | None = Field(default=None, description="with the auxiliary losses")
    learning_rate: float | None = None
    loss_scale: float | None = None
    skipped_steps: int | None = Field(default=None, description="left out so far, for overflow")
    seconds: float | None = Field(default=None, description="of the step, or the evaluation")
    tokens_per_second: float | None = None


def first_fault(error: ValueError) -> str:
    """What is wrong with a sidecar, in short."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{short('.'.join(map(str, fault['loc'])) or 'it')}: {short(fault['msg'])}"
