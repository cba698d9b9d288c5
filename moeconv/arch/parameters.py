"""Logical parameters of a decoder, the names of their axes, and the kinds of its layers.

A logical name leaves out the layer: `self_attention.query.kernel` stands for that parameter of
every layer, however the checkpoint stacks it (see `stacks`). Axis names, used everywhere:

    L layer    E expert    D hidden size (model width)    V vocabulary
    F MLP width    M MLP width of an expert    H query heads    K key/value heads    h head_dim
    S width of the shared experts together    n, m norms of all query and of all key heads
    O all query heads together    Q a query head and its gate    u 1, an axis of no meaning
    J, j what K and h are in layers of global attention, where they have sizes of their own
    P learned positions    x 3: queries, keys and values
    f MLP width of layers that reuse the keys and values of others    p further input of a layer
    A further inputs of all layers together    U vocabulary of their table

and of multi-head latent attention (MLA):

    q rank of queries    c rank of keys and values    v size of a value head
    r c and the rotated part of a key    k both parts of a query head    b c expanded: key and value
    I heads of the indexer that chooses keys    i size of one

and of linear attention:

    w value heads    d size of a value head    W all value heads together    y two gates of each
    t taps of its convolution    C what is convolved: queries, keys, values    Z C and a gate of W

Scales of a quantised parameter have its axes, or blocks of them: `D/128`, and `D/*` for one of all.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

# What an axis is as long as: a sum of products of numbers and of fields of a model's description.
AXES: Mapping[str, str] = {
    "D": "hidden_size",
    "H": "num_attention_heads",
    "K": "num_key_value_heads",
    "h": "head_dim",
    "V": "vocab_size",
    "F": "intermediate_size",
    "M": "moe_intermediate_size",
    "E": "num_experts",
    "S": "shared_intermediate_size",
    "n": "query_norm_size",
    "m": "key_norm_size",
    "O": "num_attention_heads * head_dim",
    "Q": "2 * head_dim",
    "u": "1",
    "J": "num_global_key_value_heads",
    "j": "global_head_dim",
    "P": "num_positions",
    "x": "3",
    "f": "reuse_intermediate_size",
    "p": "hidden_size_per_layer_input",
    "A": "all_layers_input_size",
    "U": "vocab_size_per_layer_input",
    "q": "q_lora_rank",
    "c": "kv_lora_rank",
    "v": "v_head_dim",
    "r": "kv_lora_rank + qk_rope_head_dim",
    "k": "qk_nope_head_dim + qk_rope_head_dim",
    "b": "qk_nope_head_dim + v_head_dim",
    "I": "index_n_heads",
    "i": "index_head_dim",
    "w": "linear_num_value_heads",
    "d": "linear_value_head_dim",
    "W": "linear_num_value_heads * linear_value_head_dim",
    "t": "linear_conv_kernel_dim",
    "C": "2 * linear_key_size + linear_num_value_heads * linear_value_head_dim",
    "Z": "2 * linear_key_size + 2 * linear_num_value_heads * linear_value_head_dim",
    "y": "2 * linear_num_value_heads",
}


def _terms(axis: str) -> list[list[str]]:
    """The products whose sum an axis is as long as."""
    return [term.split(" * ") for term in AXES[axis].split(" + ")]


def fields_of(axis: str) -> list[str]:
    """The fields of a description on which the length of an axis depends."""
    return list(dict.fromkeys(f for term in _terms(axis) for f in term if not f.isdigit()))


def length_of(axis: str, fields: Mapping[str, int | None]) -> int:
    """Length of an axis; a field that is None counts as 0."""
    return sum(
        math.prod(int(f) if f.isdigit() else fields[f] or 0 for f in term) for term in _terms(axis)
    )


_BLOCKED = re.compile(r"(.+)/(\*|[1-9][0-9]*)")


def is_axis(axis: str) -> bool:
    """True if an axis has a meaning: it is one of `AXES`, or counts blocks of one."""
    found = _BLOCKED.fullmatch(axis)
    return (found[1] if found else axis) in AXES


def is_blocked(axis: str) -> bool:
    """True if an axis has an entry for each block of another axis (`tensor.axes.blocked`)."""
    return "/" in axis


class LayerKind(str):
    """What a layer is: `dense` or `moe`, behind the kind of attention if that is not full.

    A variant of the feed-forward half, with further parameters, follows it: `mla moe+bias`.
    """

    __slots__ = ()

    @property
    def mlp(self) -> str:
        """The feed-forward half."""
        return self.rsplit(" ", 1)[-1].partition("+")[0]

    @property
    def variant(self) -> str:
        """The variant of the feed-forward half, empty for the plain one."""
        return self.rsplit(" ", 1)[-1].partition("+")[2]

    @property
    def attention(self) -> str:
        """The attention half."""
        return self.rsplit(" ", 1)[0] if " " in self else "full"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


DENSE, MOE = LayerKind("dense"), LayerKind("moe")


@dataclass(frozen=True)
class Layers:
    """A choice of layers by their kind; None takes any."""

    mlp: str | None = None
    attention: str | None = None
    variant: str | None = None

    def __contains__(self, kind: LayerKind) -> bool:
        """True if layers of this kind are chosen."""
        return (
            self.mlp in (None, kind.mlp)
            and self.attention in (None, kind.attention)
            and self.variant in (None, kind.variant)
        )

    def describe(self) -> str:
        """For docs/mapping.md."""
        plain = "plain" if self.variant == "" else self.variant
        words = [word for word in (self.attention, self.mlp, plain) if word]
        return f"{' '.join(words)} layers" if words else "every layer"


@dataclass(frozen=True)
class Parameter:
    """One logical parameter.

    Attributes:
        name: Dotted MaxText name, without the layer part.
        axes: Its axes in one layer (or in the model), e.g. `("D", "H", "h")`.
        variable: MaxText's class of it where that is not `nnx.Param`, e.g. `MoEBiasVar`
            (layers/moe.py). It then may also be stored in the Flax collection of that name below
            `params`, or in a train state's `nnx_aux`, where its layers are stacked on axis 0
            (layers/nnx_scan.py stacks all but `nnx.Param` so).
    """

    name: str
    axes: tuple[str, ...]
    variable: str | None = None

    @classmethod
    def of(cls, name: str, axes: str, variable: str | None = None) -> "Parameter":
        """With the axes as `D H h`."""
        return cls(name, tuple(axes.split()), variable)

    def may_be_in(self, collection: str) -> bool:
        """True if a checkpoint may have it in this collection (`orbax.trees`)."""
        beside = () if self.variable is None else (self.variable, "nnx_aux")
        return collection in ("params", "", *beside)


# MaxText layers/embeddings.py `Embed`, layers/nnx_decoders.py `apply_output_head`.
EMBEDDING = Parameter.of("token_embedder.embedding", "V D")
FINAL_NORM = Parameter.of("decoder.decoder_norm.scale", "D")
OUTPUT_HEAD = Parameter.of("decoder.logits_dense.kernel", "D V")
