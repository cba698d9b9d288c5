"""The parameters of MaxText's decoders, one logical name each, with the names of their axes.

A logical name leaves out the layer: `self_attention.query.kernel` stands for that parameter of
every layer, however the checkpoint stacks it (see `layout`). Axis names, used everywhere:

    L layer    E expert    D hidden size (model width)    F MLP width    V vocabulary
    H query heads    K key/value heads    h head_dim

Sources (MaxText 0.2.5): models/llama2.py, models/mixtral.py, models/envy.py (attribute names),
layers/attentions.py `init_query_w`, `init_kv_w`, `init_out_w`, layers/linears.py `MlpBlock`,
layers/moe.py `RoutedMoE`, layers/embeddings.py `Embed`, layers/nnx_decoders.py `apply_output_head`.
"""

from dataclasses import dataclass
from enum import StrEnum


class LayerKind(StrEnum):
    """What the feed-forward half of a decoder layer is."""

    DENSE = "dense"
    MOE = "moe"


@dataclass(frozen=True)
class Parameter:
    """One logical parameter.

    Attributes:
        name: Dotted MaxText name, without the layer part.
        axes: Its axes in one layer (or in the model, for a global one), e.g. `("D", "H", "h")`.
        layers: None for a parameter the model has once; otherwise the kinds of layer that have it.
    """

    name: str
    axes: tuple[str, ...]
    layers: frozenset[LayerKind] | None = None


_ALL = frozenset(LayerKind)
_DENSE = frozenset({LayerKind.DENSE})
_MOE = frozenset({LayerKind.MOE})


def _parameter(name: str, axes: str, layers: frozenset[LayerKind] | None = None) -> Parameter:
    return Parameter(name, tuple(axes.split()), layers)


EMBEDDING = _parameter("token_embedder.embedding", "V D")
FINAL_NORM = _parameter("decoder.decoder_norm.scale", "D")
OUTPUT_HEAD = _parameter("decoder.logits_dense.kernel", "D V")

PARAMETERS: dict[str, Parameter] = {
    p.name: p
    for p in (
        EMBEDDING,
        FINAL_NORM,
        OUTPUT_HEAD,
        _parameter("pre_self_attention_layer_norm.scale", "D", _ALL),
        _parameter("self_attention.query.kernel", "D H h", _ALL),
        _parameter("self_attention.key.kernel", "D K h", _ALL),
        _parameter("self_attention.value.kernel", "D K h", _ALL),
        _parameter("self_attention.out.kernel", "H h D", _ALL),
        _parameter("post_self_attention_layer_norm.scale", "D", _ALL),
        _parameter("mlp.wi_0.kernel", "D F", _DENSE),
        _parameter("mlp.wi_1.kernel", "D F", _DENSE),
        _parameter("mlp.wo.kernel", "F D", _DENSE),
        _parameter("MoeBlock_0.gate.kernel", "D E", _MOE),
        _parameter("MoeBlock_0.wi_0", "E D F", _MOE),
        _parameter("MoeBlock_0.wi_1", "E D F", _MOE),
        _parameter("MoeBlock_0.wo", "E F D", _MOE),
    )
}


def axis_name(parameter: Parameter, axis: str) -> str:
    """The model-wide name of an axis: the MLP width of experts may differ from the dense one.

    Returns:
        `"F_moe"` for `F` of an expert parameter, otherwise `axis` itself.
    """
    if axis == "F" and parameter.layers == _MOE:
        return "F_moe"
    return axis
