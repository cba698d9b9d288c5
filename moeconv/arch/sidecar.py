"""The sidecar a run leaves beside its checkpoints, so that converting it needs no flag.

`moeconv train` writes `<run>/moeconv.json` before step 1. It holds the resolved MaxText config and
the place of the tokenizer, relative to itself.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SIDECAR_NAME = "moeconv.json"


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
