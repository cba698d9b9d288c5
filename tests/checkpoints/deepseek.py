"""DeepSeek V3, V2 and V3.2, and Kimi-K2, which is a V3: compressed attention, groups, YaRN."""

from checkpoints.mistakes import ZERO, key, rope, rule
from checkpoints.row import TIED, UNSCANNED, Row, Settings

# All sizes of a head differ, and the widths; routing hangs on the name (layers/moe.py `get_topk`).
DEEPSEEK_V3: Settings = {
    "decoder_block": "deepseek",
    "model_name": "deepseek3-671b",
    "override_model_config": True,
    "attention_type": "mla",
    "base_num_kv_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 26,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "base_mlp_dim": 80,
    "base_moe_mlp_dim": 20,
    "first_num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_experts": 2,
    "routed_score_func": "sigmoid",
    "routed_bias": True,
    "routed_scaling_factor": 2.5,
    "n_routing_groups": 4,
    "topk_routing_group": 2,
    "normalization_layer_epsilon": 1e-6,
    "rope_type": "yarn",
    # The range that YaRN corrects is 1.2 to 3.1 of 4 pairs, rounded 1 to 4.
    "rope_max_timescale": 20,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_factor": 4,
    "beta_fast": 4,
    "mscale": 0.8,
}
# Kimi-K2: no groups, and YaRN corrects from one rotation to one.
KIMI_K2: Settings = {
    **DEEPSEEK_V3,
    "model_name": "kimi-k2-1t",
    "n_routing_groups": -1,
    "topk_routing_group": -1,
    "beta_fast": 1,
}
DEEPSEEK_V2: Settings = {
    **KIMI_K2,
    "model_name": "deepseek2-16b",
    "q_lora_rank": 0,
    "routed_score_func": "softmax",
    "routed_bias": False,
    "beta_fast": 4,
}

V3 = Row(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    model=DEEPSEEK_V3,
    told={
        "decoder_block": "deepseek",
        "model_name": "deepseek3-671b",
        "emb_dim": 16,  # a resolved config: what the model's file says does not win
        "attention_type": "mla",
        "shared_experts": 2,
        "first_num_dense_layers": 1,
        "routed_bias": True,
        "routed_score_func": "sigmoid",
        "normalization_layer_epsilon": 1e-6,
        "rope_type": "yarn",
    },
    following=("mla_lora dense", "mla_lora moe+bias"),
    cases={
        "unscanned-tied-one-query-matrix": (
            UNSCANNED,
            TIED,
            {"q_lora_rank": 0, "first_num_dense_layers": 2},
        ),
        "without-dense-layers-axis2-scores-unscaled": (
            {"first_num_dense_layers": 0, "base_mlp_dim": 20, "param_scan_axis": 2, "mscale": 0.0},
        ),
        "yarn-not-stretched-not-truncated": (
            {"max_position_embeddings": 64, "rope_truncate": False},
        ),
        # Without a bias the router is the same under any name, but that groups are ignored.
        "own-name-without-bias": ({"model_name": "default", "routed_bias": False},),
        "kimi_k2": (KIMI_K2,),
    },
    proof="mistakes of DeepSeek",
    mistakes={
        "no correction of scores": (
            rule("e_score_correction_bias", scale=ZERO), "layer 1 router"),
        "all groups of experts": (key("topk_group", lambda n: 4), "layer 1 experts"),
        "larger groups of experts": (key("n_group", lambda n: 2), "layer 1 experts"),
        "weights of experts unscaled": (
            key("routed_scaling_factor", lambda x: 1.0), "layer 1 experts"),
        "weights of experts not normalised": (
            key("norm_topk_prob", lambda yes: False), "layer 1 experts"),
        "no shared experts": (
            rule("shared_experts.down_proj.weight", scale=ZERO), "layer 1 experts"),
        "yarn's factor": (rope(factor=5.0), "layer 0 attention"),
        "yarn's fast end": (rope(beta_fast=8.0), "layer 0 attention"),
        "yarn's scale of scores": (
            rope(mscale=0.7, mscale_all_dim=0.7), "layer 0 attention"),
        "halves for pairs": (
            key("rope_interleave", lambda yes: False), "layer 0 attention"),
        "heads of values first": (
            rule("kv_b_proj.weight", place="c H b -> (b H) c"), "layer 0 attention"),
    },
    lost=(
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
    ),
    told_wrong=("n_routing_groups=-1", "topk_routing_group=3", "mscale=1", "rope_factor=5"),
)  # fmt: skip

V2 = Row(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    model=DEEPSEEK_V2,
    cases={
        "unscanned-tied-narrow-queries-own-name": (
            UNSCANNED,
            TIED,
            {"q_lora_rank": 28, "model_name": "default", "routed_scaling_factor": 16.0},
        ),
    },
    proof="mistakes of DeepSeek",
    mistakes={
        "without shared experts": (
            rule("shared_experts.up_proj.weight", scale=ZERO), "layer 1 experts"),
        "with fewer experts": (key("num_experts_per_tok", lambda n: 2), "layer 1 experts"),
        "without yarn's scale of scores": (
            rope(mscale=0.0, mscale_all_dim=0.0), "layer 0 attention"),
    },
    lost=("model.layers.1.self_attn.q_proj.weight",),
    told_wrong=("routed_scaling_factor=1", "num_experts_per_tok=2"),
)  # fmt: skip

# Each token sees 24 of up to 64 keys.
DEEPSEEK_V32: Settings = {
    **DEEPSEEK_V3,
    "use_indexer": True,
    "indexer_n_heads": 8,
    "indexer_head_dim": 12,
    "indexer_topk": 24,
}

V32 = Row(
    name="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    model_type="deepseek_v32",
    model=DEEPSEEK_V32,
    cases={
        "unscanned-tied-without-dense-layers-or-groups": (
            UNSCANNED,
            TIED,
            {"first_num_dense_layers": 0, "base_mlp_dim": 20, "n_routing_groups": -1},
            {"indexer_head_dim": 8, "indexer_topk": 9},
        ),
        "own-name-without-bias-every-key": (
            {"model_name": "default", "routed_bias": False, "indexer_topk": 64},
        ),
    },
    proof="mistakes of DeepSeek",
    mistaken_model={"base_num_decoder_layers": 2},
    mistakes={
        "more keys": (key("index_topk", lambda n: n + 1), "layer 0 attention"),
        "all keys": (key("index_topk", lambda n: 64), "layer 0 attention"),
        "no scale of the norm of index keys": (
            rule("indexer.k_norm.weight", scale=ZERO), "layer 0 attention"),
        "no bias of the norm of index keys": (
            rule("indexer.k_norm.bias", scale=ZERO), "layer 0 attention"),
        "weights of index heads": (
            rule("indexer.weights_proj.weight", scale=ZERO), "layer 0 attention"),
        "entries of index queries first": (
            rule("indexer.wq_b.weight", place="q I i -> (i I) q"), "layer 0 attention"),
        "no correction of scores": (
            rule("e_score_correction_bias", scale=ZERO), "layer 1 router"),
    },
    lost=(
        "model.layers.0.self_attn.indexer.k_norm.bias",
        "model.layers.1.self_attn.indexer.wk.weight",
        "model.layers.1.self_attn.indexer.weights_proj.weight",
    ),
    told_wrong=("indexer_topk=23",),
)  # fmt: skip
