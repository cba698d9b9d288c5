"""What Gemma's pages share: parameters, rules and config keys that no other family has.

MaxText's norms multiply by `scale`, transformers' by 1 + `weight`. MaxText's table is the embedding
itself; transformers multiplies its own by sqrt(hidden_size), and so divides the logits of a tied
head by it (MaxText layers/normalizations.py `RMSNorm`, layers/nnx_decoders.py `_apply_embedding`,
`apply_output_head`; transformers models/gemma3/modeling_gemma3.py `Gemma3RMSNorm`,
`Gemma3TextScaledWordEmbedding`, and the same in gemma and gemma2).
"""

import math
from typing import Any

import numpy as np

from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, not_negative, positive_int
from moeconv.arch.parameters import Parameter
from moeconv.families._shared import ATTENTION, ATTENTION_PARAMETERS, CONFIG, MLP, MLP_PARAMETERS
from moeconv.mapping.reading import Config, rope_fields, rope_of
from moeconv.mapping.rules import (
    EVERY_LAYER,
    TIED_BUT_UNTIE,
    UNTIED,
    ConfigKey,
    Factor,
    Options,
    Rule,
    When,
    constant,
    from_field,
)
from moeconv.tensor.dtypes import round_once

# --- MaxText's side -------------------------------------------------------------------------------

PARAMETERS = (
    Parameter.of("pre_self_attention_norm.scale", "D"),
    *ATTENTION_PARAMETERS[1:-1],
    Parameter.of("pre_ffw_norm.scale", "D"),
    *MLP_PARAMETERS,
)
POST_NORMS = (
    Parameter.of("post_self_attention_norm.scale", "D"),
    Parameter.of("post_ffw_norm.scale", "D"),
)
# layers/linears.py `_convert_to_activation_function`: jax.nn.gelu, by default its tanh form.
ACTIVATIONS = ("gelu", "linear")
GELU: dict[str, Any] = {"mlp_activations": list(ACTIVATIONS)}


def _cap(value: Any) -> float:
    """MaxText's null and 0 are none."""
    return 0.0 if value is None else not_negative(value)


def cap(key: str) -> ConfigField:
    """A setting that caps with tanh."""
    return ConfigField(key, key, _cap, "a number ≥ 0 or null", nullable=True)


WINDOW = ConfigField(
    "sliding_window_size", "sliding_window_size", positive_int, "a whole number ≥ 1"
)

# --- rules ----------------------------------------------------------------------------------------

NORM = Factor(
    "scale - 1",
    "MaxText's norms multiply by the scale (layers/normalizations.py `RMSNorm`), a Gemma's of "
    "Hugging Face by 1 + the weight",
    lambda m: 1.0,
    offset=-1.0,
)
RAW_LOGITS_NORM = Factor(
    "scale · sqrt(hidden_size) - 1",
    "the same; without `normalize_embedding_logits` MaxText's tied head is sqrt(hidden_size) times "
    "that of Hugging Face, and the final norm feeds only the head",
    lambda m: math.sqrt(m.hidden_size),
    offset=-1.0,
)
TABLE = Factor(
    "1/sqrt(hidden_size)",
    "a Gemma of Hugging Face multiplies its embeddings by sqrt(hidden_size), MaxText does not",
    lambda m: 1.0 / math.sqrt(m.hidden_size),
)


def _raw_logits(model: ModelDescription, options: Options) -> bool:
    return model.tie_word_embeddings and not model.normalize_embedding_logits


_RAW = When("tied, without normalize_embedding_logits", _raw_logits)
_NOT_RAW = When("untied, or with normalize_embedding_logits", lambda m, o: not _raw_logits(m, o))

# fmt: off
TRUNK = (
    Rule("token_embedder.embedding",   "model.embed_tokens.weight", "V D -> V D", scale=TABLE),
    Rule("decoder.decoder_norm.scale", "model.norm.weight", "D -> D", scale=NORM, when=_NOT_RAW),
    Rule("decoder.decoder_norm.scale", "model.norm.weight", "D -> D",
         scale=RAW_LOGITS_NORM, when=_RAW),
    Rule("decoder.logits_dense.kernel", "lm_head.weight", "D V -> V D", when=UNTIED),
    Rule("token_embedder.embedding",    "lm_head.weight", "V D -> V D",
         scale=TABLE, when=TIED_BUT_UNTIE, shared=True),
)
# fmt: on


def norm(source: str, target: str, axis: str = "D") -> Rule:
    """The norm of a layer."""
    place = "model.layers.{L}." + target
    return Rule(source, place, f"{axis} -> {axis}", scale=NORM, layers=EVERY_LAYER)


_INNER = (*ATTENTION[1:-1], *MLP)
TWO_NORMS = (
    *TRUNK,
    norm("pre_self_attention_norm.scale", "input_layernorm.weight"),
    norm("pre_ffw_norm.scale", "post_attention_layernorm.weight"),
    *_INNER,
)
FOUR_NORMS = (
    *TRUNK,
    norm("pre_self_attention_norm.scale", "input_layernorm.weight"),
    norm("post_self_attention_norm.scale", "post_attention_layernorm.weight"),
    norm("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight"),
    norm("post_ffw_norm.scale", "post_feedforward_layernorm.weight"),
    *_INNER,
)

# --- config.json ----------------------------------------------------------------------------------


def final_cap(model: ModelDescription) -> float | None:
    """layers/nnx_decoders.py `apply_output_head` caps only tied logits."""
    capped: float = model.settings["final_logits_soft_cap"]
    return (capped or None) if model.tie_word_embeddings else None


COMMON = (
    *(key for key in CONFIG if key.key != "hidden_act"),
    from_field("intermediate_size"),
    constant("hidden_activation", "gelu_pytorch_tanh"),
    constant("attention_bias", False),
)


def reading_fields(config: Config) -> dict[str, Any]:
    """Fields of all three; with MaxText's own logits the final norm holds no factor."""
    tied = config["tie_word_embeddings"]
    return {**rope_fields(rope_of(config)), "normalize_embedding_logits": tied}


FINAL_CAP = ConfigKey(
    "final_logit_softcapping",
    lambda m, o: final_cap(m),
    "`final_logits_soft_cap`, null where the logits are not tied",
)
LAYER_TYPES = ConfigKey(
    "layer_types", lambda m, o: list(m.settings["layer_types"]), "in turn, by position"
)

# --- what a model must be -------------------------------------------------------------------------

_EPSILON = 1e-6


def requires(model: ModelDescription) -> str | None:
    """What all three demand.

    models/gemma*.py leave the layers' norms at the 1e-6 of layers/normalizations.py `RMSNorm`; the
    config's number is that of the final norm and of queries and keys. configuration_gemma3.py
    `validate_architecture` wants a whole share of the width for each head.
    """
    if model.rms_norm_eps != _EPSILON:
        return (
            f"normalization_layer_epsilon={model.rms_norm_eps:g}, which MaxText has in the final "
            f"norm only; those of a Gemma's layers have {_EPSILON:g}, whatever the config says"
        )
    if model.hidden_size % model.num_attention_heads:
        return (
            f"its width of {model.hidden_size} is no multiple of its {model.num_attention_heads} "
            "heads, which transformers demands"
        )
    return None


def caveats(model: ModelDescription, options: Options) -> list[str]:
    """Transformers rounds the embeddings' factor to the dtype that it computes in."""
    exact = math.sqrt(model.hidden_size)
    rounded = float(round_once(np.asarray(exact), "bfloat16"))
    if rounded == exact:
        return []
    return [
        "transformers multiplies embeddings by sqrt(hidden_size) as the dtype that it computes in "
        f"has it: in bfloat16 {rounded:g} for {exact:.6g}, so they are {rounded / exact - 1:+.2%} "
        "off what MaxText has in its table"
    ]
