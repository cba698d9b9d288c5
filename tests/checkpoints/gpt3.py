"""GPT-3: LayerNorm with biases, learned positions, no gate, queries, keys and values in one."""

from checkpoints.mistakes import ZERO, key, rule
from checkpoints.row import TIED, UNSCANNED, Row, Settings
from moeconv.mapping.rules import Factor

# Heads as wide together as the model, and more positions than the context has.
GPT3: Settings = {
    "decoder_block": "gpt3",
    "num_experts": 1,
    "base_num_kv_heads": 4,
    "head_dim": 12,
    "trainable_position_size": 80,
    "mlp_activations": ["gelu"],
    "fused_qkv": True,
}
SPLIT: Settings = {"fused_qkv": False}
KEY_FIRST = tuple(f"self_attention.{name}.kernel" for name in ("key", "query", "value"))
AS_STORED = Factor("scale", "a mistake", lambda m: 1.0)

ROW = Row(
    name="gpt3",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    model=GPT3,
    told={
        "decoder_block": "gpt3",
        "num_experts": 1,
        "mlp_activations": ["gelu"],
        "normalize_embedding_logits": False,
    },
    full_heads=True,
    cases={
        "axis0-tied-normalised": (
            TIED,
            {"param_scan_axis": 0, "normalize_embedding_logits": True},
        ),
        "unscanned-tied-split-raw-eps-1e-6": (
            UNSCANNED,
            TIED,
            SPLIT,
            {"normalize_embedding_logits": False, "normalization_layer_epsilon": 1e-6},
        ),
        "axis2-split": (SPLIT, {"param_scan_axis": 2}),
    },
    mistaken_model={**UNSCANNED, **TIED, **SPLIT},
    mistakes={
        "keys before queries": (
            rule("attn.c_attn.weight", source=KEY_FIRST), "layer 0 attention"),
        "a norm's scale as it is stored": (
            rule("ln_1.weight", scale=AS_STORED), "layer 0 attention"),
        "no bias of a norm": (rule("ln_2.bias", scale=ZERO), "layer 0 experts"),
        "no bias of queries, keys and values": (
            rule("attn.c_attn.bias", scale=ZERO), "layer 0 attention"),
        "no bias behind the attention": (
            rule("attn.c_proj.bias", scale=ZERO), "layer 0 attention"),
        "no bias of the MLP": (rule("mlp.c_fc.bias", scale=ZERO), "layer 0 experts"),
        "no positions": (rule("wpe.weight", scale=ZERO), "embedding"),
        "no bias of the final norm": (rule("ln_f.bias", scale=ZERO), "final norm"),
        "another activation": (
            key("activation_function", lambda name: "relu"), "layer 0 experts"),
        "another epsilon": (key("layer_norm_epsilon", lambda n: 0.1), "layer 0 attention"),
        "unscaled scores": (key("scale_attn_weights", lambda yes: False), "layer 0 attention"),
    },
    lost=("transformer.wpe.weight", "transformer.h.1.attn.c_attn.bias", "transformer.ln_f.bias"),
    told_wrong=("normalization_layer_epsilon=0.1",),
    proof="mistakes of further families",
)  # fmt: skip
