"""OLMo 3: norms behind attention and MLP, a norm over all heads, windows, YaRN."""

from checkpoints.mistakes import ZERO, key, other_way, rule
from checkpoints.row import TIED, UNSCANNED, YARN, Row, Settings

# The QK norm is over all heads only under such a name (layers/attentions.py `Attention`).
OLMO3: Settings = {
    "decoder_block": "olmo3",
    "model_name": "olmo3-7b",
    "override_model_config": True,
    "num_experts": 1,
    "base_num_decoder_layers": 8,
    "use_qk_norm": True,
    "sliding_window_size": 8,
    "inhomogeneous_layer_cycle_interval": 4,
    "normalize_embedding_logits": True,
    **YARN,
    "rope_truncate": True,
}

ROW = Row(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    model=OLMO3,
    told={
        "decoder_block": "olmo3",
        "emb_dim": 16,
        "model_name": "olmo3-7b",
        "num_experts": 1,
        "use_qk_norm": True,
        "sliding_window_size": 8,
    },
    cases={
        "unscanned-tied-plain-rope": (
            UNSCANNED,
            TIED,
            {"rope_type": "default", "rope_max_timescale": 10_000},
        ),
    },
    mistaken_model={"base_num_decoder_layers": 4},
    mistakes={
        "window one wider": (key("sliding_window", lambda n: n + 1), "layer 0 attention"),
        "windows one layer on": (key("layer_types", other_way), "layer 2 attention"),
        "no norm of keys' scale": (rule("k_norm.weight", scale=ZERO), "layer 0 attention"),
        "no norm behind the MLP": (
            rule("post_feedforward_layernorm.weight", scale=ZERO),
            "layer 0",
        ),
    },
    told_wrong=("sliding_window_size=7",),
)
