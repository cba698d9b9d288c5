"""Mixtral: the default target of models with experts, because everything loads it.

A model with dense layers among its Mixture-of-Experts ones fits too, exactly: a dense MLP is copied
into every expert and the router of that layer is zero, so that the chosen experts get equal weights
(1/k each, exact for k a power of two) of equal outputs.
"""

import math
from dataclasses import replace

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import DENSE, MOE, Layers
from moeconv.families._shared import (
    ATTENTION,
    ATTENTION_PARAMETERS,
    CONFIG,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    QUANTISES,
    READING,
    TRUNK,
    experts,
    fused_experts,
    has_scaled_rope,
    moe_parameters,
    rope_reading,
    untied_by_sglang,
)
from moeconv.mapping.reading import Config, Peek
from moeconv.mapping.rules import (
    DENSE_LAYERS,
    MOE_LAYERS,
    ConfigKey,
    Options,
    Probe,
    Rule,
    Target,
    constant,
    from_field,
)

BLOCK = Block(
    name="mixtral",
    since="0.1.0",
    note="every layer is a Mixture of Experts",
    layers={MOE: (*ATTENTION_PARAMETERS, *moe_parameters("MoeBlock_0"))},
    targets=("mixtral", "ernie4_5_moe"),
    expert_width="mlp_dim",  # models/mixtral.py
    taps=Taps(mlp={"moe": "MoeBlock_0"}),
    honours={"norm_topk_prob": (True,)},  # as it always does
    idle=IDLE | IDLE_MOE | {"use_qk_norm"},
    warns={**DROPS_TOKENS, **QUANTISES},
)

# fmt: off
DENSE_AS_EXPERTS = (
    Rule(None,              "model.layers.{L}.block_sparse_moe.gate.weight",
         "E D -> E D", layers=DENSE_LAYERS, fill=0.0),
    Rule("mlp.wi_0.kernel", "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight",
         "D F -> F D", layers=DENSE_LAYERS),
    Rule("mlp.wo.kernel",   "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight",
         "F D -> D F", layers=DENSE_LAYERS),
    Rule("mlp.wi_1.kernel", "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight",
         "D F -> F D", layers=DENSE_LAYERS),
)
# fmt: on


def _requires(model: ModelDescription) -> str | None:
    if not model.moe_layers:
        return "it has no Mixture-of-Experts layer"
    return None


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = untied_by_sglang(model, options)
    if model.dense_layers:
        lines.append(
            f"the dense MLP of {len(model.dense_layers)} layers is copied to all "
            f"{model.num_experts} experts with a zero router; --target ernie4_5_moe writes it "
            "once, but llama.cpp, mistral.rs and older transformers cannot load that"
        )
        k = model.num_experts_per_tok or 1
        if math.frexp(k)[0] != 0.5:
            lines.append(
                f"with top-{k} routing the copied dense MLPs are weighted by 1/{k}, which rounds "
                "in the last place (it is exact for 1, 2, 4, … experts)"
            )
    if model.dense_layers and model.intermediate_size != model.moe_intermediate_size:
        lines.append(
            f"dense MLPs ({model.intermediate_size}) and experts ({model.moe_intermediate_size}) "
            "differ in width; the narrower are padded with zeros, which changes no result"
        )
    if has_scaled_rope(model):
        lines.append(
            "transformers before 4.48, SGLang, mlx-lm and mistral.rs ignore the Llama-3.1 RoPE "
            "scaling of a Mixtral, and compute something else without a word"
        )
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        lines.append(
            f"head_dim {model.head_dim} is not hidden_size / heads; transformers before 4.47, "
            "SGLang, mlx-lm and mistral.rs refuse to load such a Mixtral"
        )
    return lines


def _card(model: ModelDescription) -> list[str]:
    if not model.dense_layers:
        return []
    return [
        f"In the files, the MLP of each dense layer stands {model.num_experts} times, as equal "
        "experts behind a router of zeros: the same function, in an architecture that everything "
        "loads."
    ]


def _kinds(config: Config, peek: Peek) -> list[str]:
    """A layer of equal experts behind a router of zeros is the dense one that it was made of."""
    kinds: list[str] = []
    experts = range(config["num_local_experts"])
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}.block_sparse_moe"
        dense = peek.is_zero(f"{place}.gate.weight") and all(
            peek.are_equal([f"{place}.experts.{n}.{name}.weight" for n in experts])
            for name in ("w1", "w2", "w3")
        )
        kinds.append(DENSE if dense else MOE)
    return kinds if MOE in kinds else [MOE] * len(kinds)


TARGET = Target(
    name="mixtral",
    architecture="MixtralForCausalLM",
    summary="Loads in transformers 4.46 to 5, vLLM, mlx-lm, llama.cpp and mistral.rs.",
    kinds=Layers(attention="full"),
    requires=_requires,
    pads_width=True,
    caveats=_caveats,
    card=_card,
    # w1 is the gate, w3 the up and w2 the down projection (transformers 4.46
    # models/mixtral/modeling_mixtral.py `MixtralBlockSparseTop2MLP`).
    reading=replace(
        READING,
        kinds=_kinds,
        fields=lambda c: {
            **rope_reading(c),
            "layer_kinds": [MOE] * c["num_hidden_layers"],
            "moe_intermediate_size": c["intermediate_size"],
            "intermediate_size": None,
        },
    ),
    spelled=(
        *fused_experts("MoeBlock_0"),
        Rule(
            "MoeBlock_0.gate.kernel",
            "model.layers.{L}.mlp.gate.weight",
            "D E -> E D",
            layers=MOE_LAYERS,
        ),
    ),
    rules=(
        *TRUNK,
        *ATTENTION,
        *experts("MoeBlock_0", "block_sparse_moe", gate="w1", up="w3", down="w2"),
        *DENSE_AS_EXPERTS,
    ),
    probe=Probe(mlp=("mlp", "block_sparse_moe")),  # the second before transformers 5
    config=(
        constant("architectures", ["MixtralForCausalLM"]),
        constant("model_type", "mixtral"),
        *CONFIG,
        ConfigKey(
            "intermediate_size",
            lambda m, o: max(m.intermediate_size or 0, m.moe_intermediate_size or 0),
            "the wider of `intermediate_size` and `moe_intermediate_size`",
        ),
        from_field("num_local_experts", "num_experts"),
        from_field("num_experts_per_tok"),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
        constant("router_jitter_noise", 0.0),
        constant("sliding_window", None),
    ),
)
