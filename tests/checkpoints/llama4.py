"""Llama 4: chunks, layers without RoPE, a shared expert, gate and up one behind the other."""

from dataclasses import replace

from checkpoints.mistakes import ZERO, key, rule
from checkpoints.row import TIED, UNSCANNED, Row, Settings

LLAMA4: Settings = {
    "decoder_block": "llama4",
    "base_num_decoder_layers": 8,
    "base_mlp_dim": 80,
    "num_experts_per_tok": 1,
    "shared_experts": 1,
    "use_qk_norm": True,
    "nope_layer_interval": 4,
    "interleave_moe_layer_step": 2,
    "inhomogeneous_layer_cycle_interval": 4,
    "temperature_tuning": True,
    "chunk_attn_window_size": 16,
    "rope_type": "llama3.1",
}
ROUTED = ("Llama4MoEBlock_0.MoeBlock_0.wi_1", "Llama4MoEBlock_0.MoeBlock_0.wi_0")

ROW = Row(
    name="llama4",
    architecture="Llama4ForCausalLM",
    model_type="llama4_text",
    model=LLAMA4,
    told={
        "decoder_block": "llama4",
        "num_experts_per_tok": 1,
        "shared_experts": 1,
        "nope_layer_interval": 4,
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 2,
        "chunk_attn_window_size": 8,
    },
    one_width=True,
    cases={
        "unscanned-tied-half-rope-without-norm-all-moe": (
            UNSCANNED,
            TIED,
            {"rope_type": "default", "use_qk_norm": False, "base_num_decoder_layers": 4},
            {"nope_layer_interval": 3, "interleave_moe_layer_step": 1, "chunk_attn_window_size": 7},
        ),
        # Neither pattern fits into the scanned block, which begins both anew; no layer lacks RoPE.
        "odd-cycle-axis0-unscaled": (
            {"base_num_decoder_layers": 6, "inhomogeneous_layer_cycle_interval": 3},
            {"nope_layer_interval": -1, "rope_use_scale": False, "param_scan_axis": 0},
        ),
    },
    mistaken_model={"base_num_decoder_layers": 4},
    mistakes={
        "chunks one longer": (key("attention_chunk_size", lambda n: n + 1), "layer 0 attention"),
        "RoPE in every layer": (
            key("no_rope_layers", lambda found: [1] * len(found)), "layer 3 attention"),
        "chunks in every layer": (
            key("layer_types", lambda t: ["chunked_attention"] * len(t)), "layer 3 attention"),
        "no norm of queries and keys": (
            key("use_qk_norm", lambda yes: False), "layer 0 attention"),
        "halves for pairs": (
            lambda target: replace(target, rotary="half"), "layer 0 attention"),
        "no shared expert": (
            rule("shared_expert.down_proj.weight", scale=ZERO), "layer 1 experts"),
        "gate and up swapped": (
            rule("experts.gate_up_proj", source=ROUTED), "layer 1 experts"),
        "gate and up in turn": (
            rule("experts.gate_up_proj", place="E D M -> E D (M g)"), "layer 1 experts"),
    },
    lost=(
        "model.layers.1.feed_forward.shared_expert.up_proj.weight",
        "model.layers.1.feed_forward.router.weight",
    ),
    told_wrong=("chunk_attn_window_size=17", "nope_layer_interval=2", "use_qk_norm=false"),
)  # fmt: skip
