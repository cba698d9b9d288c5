"""Gemma 4: global layers of other sizes, keys as values, experts beside an MLP, seven norms."""

from checkpoints.mistakes import ZERO, key, rule
from checkpoints.row import TIED, UNSCANNED, Row, Settings
from moeconv.mapping.rules import Factor

# RoPE of part of a head hangs on the name (layers/attentions.py `init_rotary_embedding`); the cap
# bites; global heads are longer than the others, and have one key.
GEMMA4: Settings = {
    "decoder_block": "gemma4",
    "model_name": "gemma4-26b",
    "override_model_config": True,
    "base_num_decoder_layers": 6,
    "global_head_dim": 32,
    "global_num_kv_heads": 1,
    "share_kv_projections": True,
    "v_norm_with_scale": False,
    "base_mlp_dim": 80,
    "base_moe_mlp_dim": 20,
    "mlp_activations": ["gelu", "linear"],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_experts": 1,
    "norm_topk_prob": True,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "normalize_embedding_logits": True,
    "logits_via_embedding": False,
    "final_logits_soft_cap": 2.0,
    "sliding_window_size": 8,
    "local_rope_max_timescale": 500,
    "global_rope_max_timescale": 20_000,
    "global_rope_proportion": 0.25,
    "local_rope_proportion": 1.0,
    "normalization_layer_epsilon": 1e-6,
}
DENSE: Settings = {
    **GEMMA4,
    "model_name": "gemma4-31b",
    "num_experts": 1,
    "shared_experts": 0,
}
TWELVE: Settings = {"base_num_decoder_layers": 12}
OWN_VALUES: Settings = {"share_kv_projections": False, "global_num_kv_heads": 0}
ROUTED = ("mlp.moe_block.MoeBlock_0.wi_1", "mlp.moe_block.MoeBlock_0.wi_0")


def rope_of(kind: str, **changes: object):
    """Of the RoPE of one kind of layer."""
    return key("rope_parameters", lambda found: {**found, kind: {**found[kind], **changes}})


def one(name: str, place: str):
    """A scale of which nothing is left but ones."""
    return rule(name, scale=Factor("1", "a mistake", lambda m: 0.0, offset=1.0)), place


ROW = Row(
    name="gemma4",
    architecture="Gemma4ForCausalLM",
    model_type="gemma4_text",
    model=GEMMA4,
    told={
        "decoder_block": "gemma4",
        "emb_dim": 16,  # a resolved config: what the model's file says does not win
        "model_name": "gemma4-26b",
        "v_norm_with_scale": False,
        "mlp_activations": ["gelu", "linear"],
        "norm_topk_prob": True,
        "normalization_layer_epsilon": 1e-6,
        "sliding_window_size": 8,
    },
    pattern=(*("sliding moe",) * 5, "shared moe"),
    cases={
        "tied-twelve": (TIED, TWELVE),
        "unscanned-tied-unnormalised-uncapped": (
            UNSCANNED,
            TIED,
            {"normalize_embedding_logits": False, "final_logits_soft_cap": 0.0},
        ),
    },
    mistaken_model=TIED,
    mistakes={
        "window one wider": (key("sliding_window", lambda n: n + 1), "layer 0 attention"),
        "theta of the windows": (
            rope_of("sliding_attention", rope_theta=10_000.0), "layer 0 attention"),
        "theta of the global layer": (
            rope_of("full_attention", rope_theta=1e6), "layer 5 attention"),
        "a larger part rotated": (
            rope_of("full_attention", partial_rotary_factor=0.5), "layer 5 attention"),
        "all of a head rotated": (
            rope_of("full_attention", rope_type="default"), "layer 5 attention"),
        "no norm of keys": one("k_norm.weight", "layer 0 attention"),
        "no norm behind the attention": one("post_attention_layernorm.weight", "layer 0 router"),
        "no scale of experts": one("router.per_expert_scale", "layer 0 experts"),
        "no scale of the router": one("router.scale", "layer 0 router"),
        "no norm before the experts": one(
            "pre_feedforward_layernorm_2.weight", "layer 0 experts"),
        "no norm behind the MLP": one("post_feedforward_layernorm_1.weight", "layer 0 experts"),
        "no norm behind the experts": one(
            "post_feedforward_layernorm_2.weight", "layer 0 experts"),
        "no MLP beside the experts": (
            rule("mlp.down_proj.weight", scale=ZERO), "layer 0 experts"),
        "gate and up swapped": (
            rule("experts.gate_up_proj", source=ROUTED), "layer 0 experts"),
        "one expert less": (key("top_k_experts", lambda n: n - 1), "layer 0 experts"),
        "the other activation": (
            key("hidden_activation", lambda name: "silu"), "layer 0 experts"),
        "no scalar of the layer": one("layer_scalar", "layer 0"),
    },
    lost=(
        "model.layers.0.router.scale",
        "model.layers.1.router.per_expert_scale",
        "model.layers.5.layer_scalar",
        "model.layers.5.self_attn.k_proj.weight",
        "model.layers.2.post_feedforward_layernorm_2.weight",
    ),
    told_wrong=(
        "sliding_window_size=9",
        "local_rope_max_timescale=10000",
        "global_rope_proportion=0.5",
    ),
)  # fmt: skip

WITHOUT_EXPERTS = Row(
    name="gemma4_dense",
    architecture="Gemma4ForCausalLM",
    model_type="gemma4_text",
    model=DENSE,
    cases={
        "axis0-tied-twelve": (TIED, TWELVE, {"param_scan_axis": 0}),
        # Where whole heads are rotated the name does not matter.
        "own-name-own-values": (
            TIED,
            OWN_VALUES,
            {"model_name": "default", "global_rope_proportion": 1.0},
        ),
        "unscanned-part-rotated-everywhere-one-theta-one-size": (
            UNSCANNED,
            OWN_VALUES,
            {"local_rope_proportion": 0.5, "global_head_dim": 0, "local_rope_max_timescale": -1},
        ),
    },
)
