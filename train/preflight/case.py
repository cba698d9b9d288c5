"""What the config traps look at: the whole config, what is known of the run, the target."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moeconv_train.preflight.config import mesh_axes, mesh_devices, resolve
from moeconv_train.preflight.settings import RunSettings
from moeconv_train.preflight.target import Target

# MaxText's TikTokenTokenizer: the ranks file and 256 special tokens; its pad id is -1.
LLAMA3_IDS, LLAMA3_PAD = 128_256, -1


@dataclass(frozen=True)
class Case:
    """One run to be checked."""

    config: Mapping[str, Any]
    settings: RunSettings
    target: Target
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @classmethod
    def of(cls, keys: Mapping[str, Any], settings: RunSettings, target: Target) -> "Case":
        """A case of settings over MaxText's defaults."""
        return cls(resolve(keys), settings, target)

    def __getitem__(self, key: str) -> Any:
        """A MaxText key; one of another release is None."""
        return self.config.get(key)

    @property
    def fp16(self) -> bool:
        """Whether activations are float16."""
        return bool(self["dtype"] == "float16")

    @property
    def moe(self) -> bool:
        """Whether there are experts."""
        return (self["num_experts"] or 1) > 1

    @property
    def turing(self) -> bool:
        """Whether the target's GPUs are a T4 or older: no bf16, no flash attention."""
        return not self.target.has_bf16

    @property
    def mesh_axes(self) -> dict[str, int]:
        """How many devices each axis within the host spans; -1 takes what is left."""
        return mesh_axes(self.config)

    @property
    def mesh_devices(self) -> int:
        """The product of the axes that are said."""
        return mesh_devices(self.config)

    @property
    def mesh_open(self) -> list[str]:
        """The axes that take what is left."""
        return [key for key, axis in self.mesh_axes.items() if axis == -1]

    @cached_property
    def _tokenizer(self) -> tuple[int | None, int | None]:
        """Ids and pad id, as MaxText will see them (tokenizer.py, data_processing_utils.py)."""
        path = str(self["tokenizer_path"] or self.settings.tokenizer or "")
        if self["tokenizer_type"] == "tiktoken" or "tiktoken" in path:
            return (LLAMA3_IDS, LLAMA3_PAD) if "llama3" in path else (None, LLAMA3_PAD)
        return _read_tokenizer(Path(path)) if path else (None, None)

    @property
    def tokenizer_size(self) -> int | None:
        """How many ids the tokenizer has."""
        return self.settings.tokenizer_size or self._tokenizer[0]

    @property
    def pad_id(self) -> int | None:
        """The id that MaxText masks in the targets wherever it stands."""
        return self._tokenizer[1] if self.settings.pad_id is None else self.settings.pad_id

    @property
    def steps_of_schedule(self) -> int:
        """Where the learning rate's schedule ends."""
        return int(self["learning_rate_schedule_steps"] or -1)

    def words(self) -> dict[str, Any]:
        """For the sentences of the traps."""
        return {
            **self.config,
            "devices": self.target.devices,
            "target": self.target.name,
            "tokenizer_size": self.tokenizer_size,
            "pad_id": self.pad_id,
            "batches": self.settings.batches,
            "mesh_devices": self.mesh_devices,
        }


def _read_tokenizer(directory: Path) -> tuple[int | None, int | None]:
    """Ids and pad id of a local Hugging Face tokenizer."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None, None
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if isinstance(vocabulary, dict):
        ids = {**vocabulary, **ids}
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    # get_tokenizer_and_pad_id: the pad token, else the unknown token, else id 0.
    for name in ("pad_token", "unk_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            return max(ids.values()) + 1, ids[content]
    return (max(ids.values()) + 1 if ids else None), 0
