"""What a model is, as one frozen value, and where each of its fields came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from moeconv.arch.parameters import AXES, LayerKind, length_of

# What a value may be, for reading a description from a file.
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]


class Origin(StrEnum):
    """The kind of source that gave a field."""

    SHAPE = "shape"
    SIDECAR = "sidecar"
    CONFIG = "config file"
    FLAG = "flag"
    DEFAULT = "MaxText default"
    MODEL = "MaxText model"
    TOKENIZER = "tokenizer"
    BLOCK = "decoder block"


@dataclass(frozen=True)
class Provenance:
    """The source of a field, and the exact place."""

    origin: Origin
    detail: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.detail}" if self.detail else str(self.origin)


@dataclass(frozen=True)
class ModelDescription:
    """A decoder-only transformer, in Hugging Face's terms.

    Sizes are counts, None for what the model does not have. Of multi-head latent attention
    `head_dim` is the size of a query and key head, of which the last `qk_rope_head_dim` entries are
    rotated; `index_n_heads` and `index_head_dim` are of the indexer that chooses keys for it.
    `shared_intermediate_size` is the width of all shared experts together;
    `query_norm_size` and `key_norm_size` are entries of norms over all heads; `linear_key_size` is
    that of all key heads of linear attention together; `global_head_dim` and
    `num_global_key_value_heads` are of layers with global attention, where these have sizes of
    their own; `num_positions` counts learned positions; `reuse_intermediate_size` is the width of
    the MLP in layers that reuse the keys and values of earlier ones. Where each layer has an input
    of its own, that is `hidden_size_per_layer_input` wide, `all_layers_input_size` those of all
    layers, and their table has `vocab_size_per_layer_input` rows. `rope_theta` and `rms_norm_eps`
    are plain numbers; token ids are None where none is known, and several where more than one ends
    a text.
    `settings` has what only some models have, YaRN's numbers and the settings
    of their decoder block (`arch.fields.YARN`, `Block.settings`), by name. `sources` says for every
    field and every setting where its value came from.
    """

    decoder_block: str
    hidden_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    vocab_size: Count
    layer_kinds: tuple[LayerKind, ...]
    intermediate_size: Count | None
    moe_intermediate_size: Count | None
    num_experts: Count | None
    num_experts_per_tok: Count | None
    tie_word_embeddings: bool
    normalize_embedding_logits: bool
    rope_type: str
    rope_theta: Positive
    rope_use_scale: bool
    rms_norm_eps: Positive
    max_position_embeddings: Count
    q_lora_rank: Count | None = None
    kv_lora_rank: Count | None = None
    qk_nope_head_dim: Count | None = None
    qk_rope_head_dim: Count | None = None
    v_head_dim: Count | None = None
    index_n_heads: Count | None = None
    index_head_dim: Count | None = None
    shared_intermediate_size: Count | None = None
    query_norm_size: Count | None = None
    key_norm_size: Count | None = None
    linear_num_value_heads: Count | None = None
    linear_value_head_dim: Count | None = None
    linear_key_size: Count | None = None
    linear_conv_kernel_dim: Count | None = None
    num_global_key_value_heads: Count | None = None
    global_head_dim: Count | None = None
    num_positions: Count | None = None
    reuse_intermediate_size: Count | None = None
    hidden_size_per_layer_input: Count | None = None
    all_layers_input_size: Count | None = None
    vocab_size_per_layer_input: Count | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | tuple[TokenId, ...] | None = None
    pad_token_id: TokenId | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Provenance] = field(default_factory=dict, compare=False)

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_kinds)

    @property
    def rotary(self) -> str:
        """How MaxText orders the rotated halves of a head (layers/embeddings.py).

        `RotaryEmbedding` (`rope_type: default`) rotates halves, as Hugging Face does;
        `LLaMARotaryEmbedding` (`llama3.1`) rotates neighbours. `YarnRotaryEmbedding` takes either
        (`rope_interleave`) and gives halves, of queries and keys alike, so that no score changes.
        """
        neighbours = self.rope_type == "llama3.1" or self.settings.get("rope_interleave", False)
        return "interleaved" if neighbours else "half"

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the Mixture-of-Experts layers, from 0."""
        return tuple(n for n, kind in enumerate(self.layer_kinds) if kind.mlp == "moe")

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Numbers of the dense layers, from 0."""
        return tuple(n for n, kind in enumerate(self.layer_kinds) if kind.mlp == "dense")

    def sizes(self) -> dict[str, int]:
        """Length of every axis of its parameters, 0 for one that it has not."""
        return {axis: length_of(axis, vars(self)) for axis in AXES}

    def values(self) -> dict[str, Any]:
        """Every field but `sources`, and every setting beside them, as JSON-able values."""
        apart = ("sources", "settings")
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        named["layer_kinds"] = [str(kind) for kind in self.layer_kinds]
        every = {**named, **self.settings}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in every.items()}
