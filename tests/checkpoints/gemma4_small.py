"""Gemma 4 E2B and E4B: an input of each layer, keys and values reused, MLPs of two widths."""

from checkpoints.gemma4 import one, rope_of
from checkpoints.mistakes import ZERO, key, rule
from checkpoints.row import TIED, UNSCANNED, Row, Settings

# E2B: four of five layers have a window; two of ten reuse the keys of layers that are not the last
# before them, the last but one of windows.
E2B: Settings = {
    "decoder_block": "gemma4_small",
    "model_name": "gemma4-e2b",
    "override_model_config": True,
    **UNSCANNED,
    "num_experts": 1,
    "base_num_decoder_layers": 10,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 1,
    "global_head_dim": 32,
    "base_mlp_dim": 40,
    "mlp_activations": ["gelu", "linear"],
    "v_norm_with_scale": False,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 160,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
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
E4B: Settings = {
    "model_name": "gemma4-e4b",
    "base_num_decoder_layers": 12,
    "num_kv_shared_layers": 6,
    "use_double_wide_mlp": False,
}

ROW = Row(
    name="gemma4_small",
    architecture="Gemma4ForCausalLM",
    model_type="gemma4_text",
    model=E2B,
    forms=("unscanned, tied",),
    one_kv=True,
    told={
        "decoder_block": "gemma4_small",
        "emb_dim": 16,  # a resolved config: what the model's file says does not win
        "model_name": "gemma4-e2b",
        "v_norm_with_scale": False,
        "mlp_activations": ["gelu", "linear"],
        "normalization_layer_epsilon": 1e-6,
        "sliding_window_size": 8,
    },
    pattern=(
        *("sliding dense",) * 4,
        "global dense",
        *("sliding dense",) * 2,
        *("sliding dense+reuse",) * 2,
        "global dense+reuse",
    ),
    cases={
        "e4b-tied": (TIED, E4B),
        "own-name-one-width-more-rows": (
            TIED,
            E4B,
            {
                "model_name": "default",
                "global_rope_proportion": 1.0,
                "vocab_size_per_layer_input": 200,
            },
        ),
        "tied-raw-five-layers-nothing-reused-one-size": (
            TIED,
            {
                "base_num_decoder_layers": 5,
                "num_kv_shared_layers": 0,
                "use_double_wide_mlp": False,
                "global_head_dim": 0,
                "normalize_embedding_logits": False,
            },
        ),
    },
    mistaken_model=TIED,
    mistakes={
        "window one wider": (key("sliding_window", lambda n: n + 1), "layer 0 attention"),
        "theta of the windows": (
            rope_of("sliding_attention", rope_theta=10_000.0), "layer 0 attention"),
        "a larger part rotated": (
            rope_of("full_attention", partial_rotary_factor=0.5), "layer 4 attention"),
        "no norm of keys": one("k_norm.weight", "layer 0 attention"),
        "no row of a token": (rule("embed_tokens_per_layer.weight", scale=ZERO), "layer 0"),
        "no part of the embedding": (
            rule("per_layer_model_projection.weight", scale=ZERO), "layer 0"),
        "no norm of that part": one("per_layer_projection_norm.weight", "layer 0"),
        "no norm behind the input": one("post_per_layer_input_norm.weight", "layer 0"),
        "no gate of the input": (rule("per_layer_input_gate.weight", scale=ZERO), "layer 0"),
        "the other activation": (key("hidden_activation", lambda name: "silu"), "layer 0 experts"),
        "no scalar of the layer": one("layer_scalar", "layer 0"),
    },
    lost=(
        "model.embed_tokens_per_layer.weight",
        "model.per_layer_projection_norm.weight",
        "model.layers.9.per_layer_projection.weight",
        "model.layers.9.mlp.up_proj.weight",
    ),
    told_wrong=("sliding_window_size=9", "global_rope_proportion=0.5"),
    proof="mistakes of further families",
)  # fmt: skip
