"""The matrix: MaxText writes, moeconv converts, transformers computes MaxText's logits."""

import json

import pytest
from helpers import assert_same_model, run
from maxtext_lab import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    ENVY,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT_OSS,
    KIMI_K2,
    LLAMA2,
    LLAMA4,
    MISTRAL,
    MIXTRAL,
    OLMO3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    TIED,
)

UNSCANNED = {"scan_layers": False}
UNTIED = {"logits_via_embedding": False}
ZARR2 = {"checkpoint_storage_use_zarr3": False}
NO_OCDBT = {"checkpoint_storage_use_zarr3": False, "checkpoint_storage_use_ocdbt": False}
FSDP = {"ici_fsdp_parallelism": 4}
EXPERTS = {"ici_expert_parallelism": 2, "ici_fsdp_parallelism": 2}
STEP3 = {
    "base_num_decoder_layers": 6,
    "interleave_moe_layer_step": 3,
    "inhomogeneous_layer_cycle_interval": 3,
}
LLAMA31 = {"rope_type": "llama3.1", "max_target_length": 96}

# One line a model: blocks and what differs from the lab's base (4 layers, 4 experts top-2, GQA 4:2,
# head_dim 16, hidden 48, fp32, RoPE theta 500,000, untied, scanned on axis 1, OCDBT + zarr3, one
# chunk an array). What has nothing to do with each other shares a model.
CASES = {
    "mixtral": (MIXTRAL,),
    "mixtral-tied": (MIXTRAL, TIED),
    "mixtral-tied-unnormalised": (MIXTRAL, TIED, {"normalize_embedding_logits": False}),
    "mixtral-unscanned": (MIXTRAL, UNSCANNED),
    "mixtral-axis0": (MIXTRAL, TIED, {"param_scan_axis": 0}),
    "mixtral-axis2": (MIXTRAL, {"param_scan_axis": 2}),
    "mixtral-mqa-head-dim-24-top-1-theta-1e4-eps-1e-6": (
        MIXTRAL,
        {"base_num_kv_heads": 1, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 1},
        {"rope_max_timescale": 10_000, "normalization_layer_epsilon": 1e-6},
    ),
    "mixtral-mha-top-4-theta-1e6-eps-1e-3": (
        MIXTRAL,
        {"base_num_kv_heads": 4, "num_experts": 8, "num_experts_per_tok": 4},
        {"rope_max_timescale": 1_000_000, "normalization_layer_epsilon": 1e-3},
    ),
    "mixtral-llama3.1-rope": (MIXTRAL, LLAMA31),
    "mixtral-llama3.1-rope-unscaled": (MIXTRAL, LLAMA31, {"rope_use_scale": False}),
    "envy-tied": (ENVY, TIED),
    "envy-untied": (ENVY, UNTIED),
    "envy-unscanned": (ENVY, TIED, UNSCANNED),
    "envy-axis0": (ENVY, TIED, {"param_scan_axis": 0}),
    "envy-step-3": (ENVY, TIED, STEP3),
    "envy-step-3-unscanned": (ENVY, TIED, STEP3, UNSCANNED),
    "envy-one-width-top-1": (ENVY, {"base_mlp_dim": 96, "num_experts_per_tok": 1}),
    "envy-wide-dense-mha-head-dim-32-top-4": (
        ENVY,
        TIED,
        {"base_mlp_dim": 128, "base_num_kv_heads": 4, "head_dim": 32},
        {"num_experts": 8, "num_experts_per_tok": 4},
    ),
    "envy-all-moe": (
        ENVY,
        {
            "base_mlp_dim": 96,
            "interleave_moe_layer_step": 1,
            "inhomogeneous_layer_cycle_interval": 1,
        },
    ),
    "envy-cycle-of-two-steps": (
        ENVY,
        TIED,
        {"interleave_moe_layer_step": 2, "inhomogeneous_layer_cycle_interval": 4},
    ),
    "envy-llama3.1-rope": (ENVY, LLAMA31),
    "llama2": (LLAMA2,),
    "llama2-unscanned-axis0": (LLAMA2, UNSCANNED, {"param_scan_axis": 0}),
    "llama2-llama3.1-rope-tied": (LLAMA2, LLAMA31, TIED, {"head_dim": 32}),
    "mistral": (MISTRAL,),
    "mistral-unscanned-tied-llama3.1-rope": (MISTRAL, UNSCANNED, TIED, LLAMA31),
    "qwen2": (QWEN2,),
    "qwen2-unscanned-tied-llama3.1-rope": (QWEN2, UNSCANNED, TIED, LLAMA31),
    "qwen3": (QWEN3,),
    "qwen3-unscanned-tied-llama3.1-rope": (QWEN3, UNSCANNED, TIED, LLAMA31),
    "qwen3_moe": (QWEN3_MOE,),
    "qwen3_moe-unscanned-tied-llama3.1-rope": (QWEN3_MOE, UNSCANNED, TIED, LLAMA31),
    "gpt_oss": (GPT_OSS,),
    "gpt_oss-unscanned-tied-llama3.1-rope": (GPT_OSS, UNSCANNED, TIED, LLAMA31),
    "gpt_oss-axis0-truncated-unscaled-yarn-in-pairs": (
        GPT_OSS,
        {"param_scan_axis": 0, "rope_truncate": True, "rope_interleave": True},
        {"rope_attention_scaling": False},
    ),
    # A scanned block begins the pattern of windows anew: sliding, full, sliding, sliding.
    "gpt_oss-cycle-of-3": (
        GPT_OSS,
        {"base_num_decoder_layers": 6, "inhomogeneous_layer_cycle_interval": 3},
        {"rope_type": "default", "sliding_window_size": 1, "num_experts_per_tok": 4},
    ),
    "llama4": (LLAMA4,),
    "llama4-unscanned-tied-half-rope-without-norm-all-moe": (
        LLAMA4,
        UNSCANNED,
        TIED,
        {"rope_type": "default", "use_qk_norm": False, "base_num_decoder_layers": 4},
        {"nope_layer_interval": 3, "interleave_moe_layer_step": 1, "chunk_attn_window_size": 7},
    ),
    # Neither pattern fits into the scanned block, which begins both anew; no layer lacks RoPE.
    "llama4-odd-cycle-axis0-unscaled": (
        LLAMA4,
        {"base_num_decoder_layers": 6, "inhomogeneous_layer_cycle_interval": 3},
        {"nope_layer_interval": -1, "rope_use_scale": False, "param_scan_axis": 0},
    ),
    "olmo3": (OLMO3,),
    "olmo3-unscanned-tied-plain-rope": (
        OLMO3,
        UNSCANNED,
        TIED,
        {"rope_type": "default", "rope_max_timescale": 10_000},
    ),
    # Without what makes it a Qwen, a block's models are Llamas whose query is scaled explicitly.
    "qwen2-plain": (QWEN2, {"attention_bias": False}),
    "qwen3-plain-axis0": (QWEN3, {"use_qk_norm": False, "param_scan_axis": 0}),
}
CASES |= {
    "deepseek_v3": (DEEPSEEK_V3,),
    "deepseek_v3-unscanned-tied-one-query-matrix": (
        DEEPSEEK_V3,
        UNSCANNED,
        TIED,
        {"q_lora_rank": 0, "first_num_dense_layers": 2},
    ),
    "deepseek_v3-without-dense-layers-axis2-scores-unscaled": (
        DEEPSEEK_V3,
        {"first_num_dense_layers": 0, "base_mlp_dim": 20, "param_scan_axis": 2, "mscale": 0.0},
    ),
    "deepseek_v3-yarn-not-stretched-not-truncated": (
        DEEPSEEK_V3,
        {"max_position_embeddings": 64, "rope_truncate": False},
    ),
    # Without a bias the router is the same under any name, but that groups are ignored.
    "deepseek_v3-own-name-without-bias": (
        DEEPSEEK_V3,
        {"model_name": "default", "routed_bias": False},
    ),
    "deepseek_v3-kimi_k2": (KIMI_K2,),
    "deepseek_v2": (DEEPSEEK_V2,),
    "deepseek_v2-unscanned-tied-narrow-queries-own-name": (
        DEEPSEEK_V2,
        UNSCANNED,
        TIED,
        {"q_lora_rank": 28, "model_name": "default", "routed_scaling_factor": 16.0},
    ),
}
RAW = {"normalize_embedding_logits": False}
CASES |= {
    "gemma3": (GEMMA3,),
    "gemma3-unscanned-tied": (GEMMA3, UNSCANNED, TIED),
    # Fewer layers than a scanned block has; no other theta with a window, nothing stretched.
    "gemma3-all-behind-the-blocks-tied-raw-one-theta": (
        GEMMA3,
        TIED,
        RAW,
        {"base_num_decoder_layers": 3, "local_rope_max_timescale": -1},
        {"rope_linear_scaling_factor": 1.0, "final_logits_soft_cap": None},
    ),
    "gemma3-27b-no-remainder-axis0": (
        GEMMA3,
        {"model_name": "gemma3-27b", "base_num_decoder_layers": 12, "param_scan_axis": 0},
    ),
    "gemma2": (GEMMA2, TIED),
    "gemma2-unscanned-raw-tied-head-dim-24": (GEMMA2, UNSCANNED, TIED, RAW, {"head_dim": 24}),
    "gemma2-untied-without-caps-axis2": (
        GEMMA2,
        {"attn_logits_soft_cap": None, "param_scan_axis": 2, "base_num_decoder_layers": 3},
    ),
    "gemma": (GEMMA, TIED),
    "gemma-unscanned-untied-mqa": (GEMMA, UNSCANNED, {"base_num_kv_heads": 1}),
}
# One of each of these in every run of the suite.
_DEAR = {"deepseek_v3", "gpt_oss", "llama4", "olmo3", "gemma", "gemma2", "gemma3"}
SLOW = {name for name in CASES if name.startswith(("deepseek", *_DEAR))} - _DEAR
# What moves no value: the model, how else it is written, and whether as a whole train state.
STORED = {
    "mixtral-zarr2": ("mixtral-tied", ZARR2, False),
    "mixtral-no-ocdbt": ("mixtral", NO_OCDBT, False),
    "mixtral-fsdp": ("mixtral-tied", FSDP, False),
    "mixtral-experts-sharded": ("mixtral", EXPERTS, False),
    "mixtral-state": ("mixtral", {}, True),
    "envy-fsdp": ("envy-tied", FSDP, False),
    "envy-experts-sharded": ("envy-untied", EXPERTS, False),
    "envy-state": ("envy-tied", {}, True),
    "envy-fsdp-state": ("envy-tied", FSDP, True),
    "llama2-fsdp": ("llama2", FSDP, False),
    "llama2-state": ("llama2-llama3.1-rope-tied", {}, True),
    "deepseek_v3-state": ("deepseek_v3", {}, True),
}

ARCHITECTURES = {
    "envy": "mixtral",
    "llama4": "llama4_text",
    "llama2": "llama",
    "qwen2-plain": "llama",
}
ARCHITECTURES |= {"qwen3-plain-axis0": "llama", "gemma3": "gemma3_text"}
ARCHITECTURES |= {name: name.partition("-")[0] for name in CASES if name.startswith("deepseek")}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES],
)
def test_the_logits_are_maxtexts(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name])
    run(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    block = checkpoint.config["decoder_block"]
    assert config["model_type"] == ARCHITECTURES.get(name, ARCHITECTURES.get(block, block))
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", STORED)
def test_the_same_model_however_it_is_stored(maxtext_lab, tmp_path, name):
    """Bit for bit that of the case above, whose logits are MaxText's."""
    model, storage, full_state = STORED[name]
    run(maxtext_lab.checkpoint(*CASES[model]), tmp_path / "one")
    step = 3 if full_state else 0
    stored = maxtext_lab.checkpoint(*CASES[model], storage, full_state=full_state, step=step)
    assert run(stored, tmp_path / "out").source.step == step
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "envy-tied",
        "envy-untied",
        "envy-unscanned",
        "envy-step-3",
        "envy-wide-dense-mha-head-dim-32-top-4",
        "envy-all-moe",
        "mixtral-tied",
        "mixtral-mqa-head-dim-24-top-1-theta-1e4-eps-1e-6",
    ],
)
def test_compact_target(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name])
    run(checkpoint, tmp_path / "out", target="ernie4_5_moe")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "ernie4_5_moe"
    assert_same_model(checkpoint, tmp_path / "out")


def test_ernie_takes_interleaved_rope_as_it_is(maxtext_lab, tmp_path):
    checkpoint = maxtext_lab.checkpoint(*CASES["envy-llama3.1-rope"], {"rope_use_scale": False})
    manifest = run(checkpoint, tmp_path / "out", target="ernie4_5_moe")
    assert not any("rotary" in rule for rule in manifest.rules)
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral-tied", "envy-tied", "llama2-llama3.1-rope-tied"])
def test_untie(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name])
    run(checkpoint, tmp_path / "out", untie=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("block", "stored"),
    [
        ("envy-tied", "bfloat16"),  # llama2 in bfloat16 is in test_old_releases.py
        pytest.param("mixtral-tied", "float16", marks=pytest.mark.slow),
        pytest.param("envy-tied", "float16", marks=pytest.mark.slow),
        pytest.param("llama2", "float16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_weights(maxtext_lab, tmp_path, block, stored):
    """Stored in 16 bits, written in 32: only the exact widening and one rounding of the folds."""
    checkpoint = maxtext_lab.checkpoint(*CASES[block], {"weight_dtype": stored})
    run(checkpoint, tmp_path / "out", dtype="float32")
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_kept(maxtext_lab, tmp_path, stored):
    """Kept in 16 bits, exactly, where the folds are powers of two (head_dim 16, hidden 64)."""
    checkpoint = maxtext_lab.checkpoint(
        *CASES["mixtral-tied"], {"weight_dtype": stored, "base_emb_dim": 64}
    )
    manifest = run(checkpoint, tmp_path / "out")
    assert manifest.dtype == stored
    assert {fold.exact for fold in manifest.folds} == {True}
    assert_same_model(checkpoint, tmp_path / "out")
