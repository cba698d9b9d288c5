"""GPT-OSS: windows, sinks, biases, gate and up in turn, YaRN."""

from checkpoints.mistakes import ZERO, key, other_way, rope, rule
from checkpoints.row import LLAMA31, TIED, UNSCANNED, YARN, Row, Settings

GPT_OSS: Settings = {
    "decoder_block": "gpt_oss",
    "sliding_window_size": 8,
    "attention_bias": True,
    "attention_sink": True,
    "mlp_bias": True,
    "routed_bias": True,
    "mlp_activations": ["sigmoid", "linear"],
    "mlp_activations_limit": 1.5,  # so that it clips
    "inhomogeneous_layer_cycle_interval": 2,
    **YARN,
}
EXPERTS = ("GptOssMlp.wi_1", "GptOssMlp.wi_0")

ROW = Row(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    model=GPT_OSS,
    told={
        "decoder_block": "gpt_oss",
        "sliding_window_size": 8,
        "mlp_activations": ["sigmoid", "linear"],
        "mlp_activations_limit": 7.0,
        "inhomogeneous_layer_cycle_interval": 2,
    },
    cases={
        "unscanned-tied-llama3.1-rope": (UNSCANNED, TIED, LLAMA31),
        "axis0-truncated-unscaled-yarn-in-pairs": (
            {"param_scan_axis": 0, "rope_truncate": True, "rope_interleave": True},
            {"rope_attention_scaling": False},
        ),
        # A scanned block begins the pattern of windows anew: sliding, full, sliding, sliding.
        "cycle-of-3": (
            {"base_num_decoder_layers": 6, "inhomogeneous_layer_cycle_interval": 3},
            {"rope_type": "default", "sliding_window_size": 1, "num_experts_per_tok": 4},
        ),
    },
    mistakes={
        "window one wider": (key("sliding_window", lambda n: n + 1), "layer 0 attention"),
        "window one narrower": (key("sliding_window", lambda n: n - 1), "layer 0 attention"),
        "windows in the other layers": (key("layer_types", other_way), "layer 0 attention"),
        "sinks as zeros": (rule(".sinks", scale=ZERO), "layer 0 attention"),
        "no bias of the output": (rule("o_proj.bias", scale=ZERO), "layer 0 attention"),
        "yarn's factor": (rope(factor=5.0), "layer 0 attention"),
        "yarn truncated": (rope(truncate=True), "layer 0 attention"),
        "yarn's fast end": (rope(beta_fast=5.0), "layer 0 attention"),
        "yarn's slow end": (rope(beta_slow=1.5), "layer 0 attention"),
        "yarn's scale of attention": (rope(attention_factor=1.0), "layer 0 attention"),
        "yarn's original length": (
            rope(original_max_position_embeddings=60), "layer 0 attention"),
        "the limit": (key("swiglu_limit", lambda x: 7.0), "layer 0 experts"),
        "no router bias": (rule("router.bias", scale=ZERO), "layer 0 router"),
        "gate and up swapped": (
            rule("experts.gate_up_proj", source=EXPERTS), "layer 0 experts"),
        "gate behind up": (
            rule("experts.gate_up_proj", place="E D M -> E D (g M)"), "layer 0 experts"),
        "biases of gate behind up": (
            rule("gate_up_proj_bias", place="E M -> E (g M)"), "layer 0 experts"),
    },
    lost=(
        "model.layers.2.self_attn.sinks",
        "model.layers.2.self_attn.q_proj.bias",
        "model.layers.2.mlp.router.bias",
        "model.layers.2.mlp.experts.gate_up_proj_bias",
    ),
    told_wrong=("sliding_window_size=9", "rope_factor=5", "mlp_activations_limit=7"),
)  # fmt: skip
