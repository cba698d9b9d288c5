"""Gemma 1 to 3: norms without their 1, caps, windows, two thetas, pairs and what is behind blocks.

Caps bend scores and logits of about 1.
"""

from typing import Any

from checkpoints.mistakes import ZERO, key, other_way, rule
from checkpoints.row import TIED, UNSCANNED, Mistaken, Row, Settings

RAW: Settings = {"normalize_embedding_logits": False}
_TOLD: Settings = {
    "num_experts": 1,
    "mlp_activations": ["gelu", "linear"],
    "normalization_layer_epsilon": 1e-6,
}
GEMMA: Settings = {**_TOLD, "decoder_block": "gemma"}
_FOUR_NORMS: Settings = {
    **_TOLD,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 8,
    "final_logits_soft_cap": 1.5,
}
# Two layers a module.
GEMMA2: Settings = {
    **_FOUR_NORMS,
    "decoder_block": "gemma2",
    "base_num_decoder_layers": 2,
    "attn_logits_soft_cap": 2.0,
}
# MaxText builds it under a few names only (models/gemma3.py `get_query_pre_attn_scalar`). Two
# layers are behind the scanned block of six.
GEMMA3: Settings = {
    **_FOUR_NORMS,
    "decoder_block": "gemma3",
    "model_name": "gemma3-4b",
    "override_model_config": True,
    "base_num_decoder_layers": 8,
    "logits_via_embedding": False,
    "rope_max_timescale": 200,
    "local_rope_max_timescale": 50,
    "rope_linear_scaling_factor": 4.0,
}
_FORMS = ("scanned, untied", "unscanned, tied")


def _thetas_swapped() -> Mistaken:
    def swapped(rope: dict[str, Any]) -> dict[str, Any]:
        full, local = rope["full_attention"], rope["sliding_attention"]
        return {
            "full_attention": {**full, "rope_theta": local["rope_theta"]},
            "sliding_attention": {**local, "rope_theta": full["rope_theta"]},
        }

    pages = (
        key("rope_parameters", swapped),
        key("rope_theta", lambda theta: 50.0),
        key("rope_local_base_freq", lambda theta: 200.0),
    )
    return lambda target: pages[0](pages[1](pages[2](target)))


def _not_stretched() -> Mistaken:
    def plain(rope: dict[str, Any]) -> dict[str, Any]:
        theta = rope["full_attention"]["rope_theta"]
        return {**rope, "full_attention": {"rope_type": "default", "rope_theta": theta}}

    pages = key("rope_parameters", plain), key("rope_scaling", lambda found: None)
    return lambda target: pages[0](pages[1](target))


ONE = Row(
    name="gemma",
    architecture="GemmaForCausalLM",
    model_type="gemma",
    model=GEMMA,
    told=GEMMA,
    whole_shares=True,
    cases={
        "tied": (TIED,),
        "unscanned-tied-raw-mqa": (UNSCANNED, TIED, RAW, {"base_num_kv_heads": 1}),
    },
    forms=_FORMS,
    mistaken_model=TIED,
    mistakes={
        "SiLU": (key("hidden_act", lambda name: "silu"), "layer 0 experts"),
        "scores scaled twice": (rule("q_proj.weight", scale=None), "layer 0 attention"),
        "embeddings not scaled": (rule("embed_tokens.weight", scale=None), "embedding"),
    },
    lost=("model.embed_tokens.weight",),
    proof="mistakes of Gemma",
)
TWO = Row(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    model=GEMMA2,
    told={
        **_TOLD,
        "decoder_block": "gemma2",
        "sliding_window_size": 8,
        "attn_logits_soft_cap": 50.0,
        "final_logits_soft_cap": None,
    },
    whole_shares=True,
    cases={
        "tied": (TIED,),
        "unscanned-tied-raw-head-dim-24": (UNSCANNED, TIED, RAW, {"head_dim": 24}),
        "without-caps-axis2": (
            {"attn_logits_soft_cap": None, "param_scan_axis": 2, "base_num_decoder_layers": 3},
        ),
    },
    forms=_FORMS,
    mistaken_model=TIED,
    mistakes={
        "norms behind without a scale": (
            rule("post_attention_layernorm.weight", scale=ZERO),
            "layer 0 experts",
        ),
        "scores not capped": (
            key("attn_logit_softcapping", lambda cap: None),
            "layer 0 attention",
        ),
        "scores scaled twice": (rule("q_proj.weight", scale=None), "layer 0 attention"),
        "windows in the other layers": (key("layer_types", other_way), "layer 0 attention"),
    },
    lost=("model.layers.3.post_feedforward_layernorm.weight",),
    told_wrong=("attn_logits_soft_cap=3", "sliding_window_size=7"),
    proof="mistakes of Gemma",
)
THREE = Row(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    model=GEMMA3,
    told={
        **_TOLD,
        "decoder_block": "gemma3",
        "emb_dim": 16,
        "model_name": "gemma3-4b",
        "sliding_window_size": 8,
    },
    whole_shares=True,
    cases={
        "unscanned-tied": (UNSCANNED, TIED),
        # Fewer layers than a scanned block has.
        "all-behind-the-blocks-tied-raw-one-theta": (
            TIED,
            RAW,
            {"base_num_decoder_layers": 3, "local_rope_max_timescale": -1},
            {"rope_linear_scaling_factor": 1.0, "final_logits_soft_cap": None},
        ),
        "27b-none-behind-axis0": (
            {"model_name": "gemma3-27b", "base_num_decoder_layers": 12, "param_scan_axis": 0},
        ),
    },
    forms=_FORMS,
    mistaken_model=TIED,
    mistakes={
        "scores scaled as of the 27b": (
            key("query_pre_attn_scalar", lambda n: 12),
            "layer 0 attention",
        ),
        "window one wider": (key("sliding_window", lambda n: n + 1), "layer 0 attention"),
        "window one narrower": (key("sliding_window", lambda n: n - 1), "layer 0 attention"),
        "blocks one layer longer": (
            key("layer_types", lambda types: types[-1:] + types[:-1]),
            "layer 5 attention",
        ),
        "thetas swapped": (_thetas_swapped(), "layer 0 attention"),
        "nothing stretched": (_not_stretched(), "layer 5 attention"),
        "no scale of the norm of keys": (rule("k_norm.weight", scale=ZERO), "layer 0 attention"),
        "a norm's 1": (
            rule("pre_feedforward_layernorm.weight", scale=None),
            "layer 0 experts",
        ),
        "the final norm's 1": (rule("model.norm.weight", scale=None), "final norm"),
        "embeddings not scaled": (rule("embed_tokens.weight", scale=None), "embedding"),
    },
    lost=("model.layers.7.self_attn.q_norm.weight",),
    told_wrong=(
        "sliding_window_size=9",
        "local_rope_max_timescale=-1",
        "rope_linear_scaling_factor=1",
        "model_name=gemma3-27b",
    ),
    proof="mistakes of Gemma",
)
