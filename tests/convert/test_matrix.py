"""The matrix: MaxText writes, moeconv converts, transformers computes MaxText's logits."""

import json

import pytest
from helpers import assert_same_model, run
from maxtext_lab import ENVY, LLAMA2, MIXTRAL, TIED

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

# One line a case: blocks and what differs from the lab's base (4 layers, 4 experts top-2, GQA 4:2,
# head_dim 16, hidden 48, fp32, RoPE theta 500,000, untied, OCDBT + zarr3, one chunk an array).
CASES = {
    "mixtral": (MIXTRAL,),
    "mixtral-tied": (MIXTRAL, TIED),
    "mixtral-tied-unnormalised": (MIXTRAL, TIED, {"normalize_embedding_logits": False}),
    "mixtral-unscanned": (MIXTRAL, UNSCANNED),
    "mixtral-axis0": (MIXTRAL, TIED, {"param_scan_axis": 0}),
    "mixtral-axis2": (MIXTRAL, {"param_scan_axis": 2}),
    "mixtral-mha": (MIXTRAL, {"base_num_kv_heads": 4}),
    "mixtral-mqa": (MIXTRAL, {"base_num_kv_heads": 1}),
    "mixtral-head-dim-24": (MIXTRAL, {"head_dim": 24}),
    "mixtral-8-experts-top-1": (MIXTRAL, {"num_experts": 8, "num_experts_per_tok": 1}),
    "mixtral-8-experts-top-4": (MIXTRAL, {"num_experts": 8, "num_experts_per_tok": 4}),
    "mixtral-theta-1e4-eps-1e-6": (
        MIXTRAL,
        {"rope_max_timescale": 10_000, "normalization_layer_epsilon": 1e-6},
    ),
    "mixtral-theta-1e6-eps-1e-3": (
        MIXTRAL,
        {"rope_max_timescale": 1_000_000, "normalization_layer_epsilon": 1e-3},
    ),
    "mixtral-llama3.1-rope": (MIXTRAL, LLAMA31),
    "mixtral-llama3.1-rope-unscaled": (MIXTRAL, LLAMA31, {"rope_use_scale": False}),
    "mixtral-zarr2": (MIXTRAL, TIED, ZARR2),
    "mixtral-no-ocdbt": (MIXTRAL, NO_OCDBT),
    "mixtral-fsdp": (MIXTRAL, TIED, FSDP),
    "mixtral-experts-sharded": (MIXTRAL, EXPERTS),
    "envy-tied": (ENVY, TIED),
    "envy-untied": (ENVY, UNTIED),
    "envy-unscanned": (ENVY, TIED, UNSCANNED),
    "envy-axis0": (ENVY, TIED, {"param_scan_axis": 0}),
    "envy-step-3": (ENVY, TIED, STEP3),
    "envy-step-3-unscanned": (ENVY, TIED, STEP3, UNSCANNED),
    "envy-one-width": (ENVY, TIED, {"base_mlp_dim": 96}),
    "envy-wide-dense": (ENVY, TIED, {"base_mlp_dim": 128}),
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
    "envy-head-dim-32-mha": (ENVY, TIED, {"head_dim": 32, "base_num_kv_heads": 4}),
    "envy-top-1": (ENVY, {"num_experts_per_tok": 1}),
    "envy-top-4": (ENVY, {"num_experts": 8, "num_experts_per_tok": 4}),
    "envy-llama3.1-rope": (ENVY, LLAMA31),
    "envy-fsdp": (ENVY, TIED, FSDP),
    "envy-experts-sharded": (ENVY, EXPERTS),
    "llama2": (LLAMA2,),
    "llama2-tied": (LLAMA2, TIED),
    "llama2-unscanned-axis0": (LLAMA2, UNSCANNED, {"param_scan_axis": 0}),
    "llama2-llama3.1-rope-tied": (LLAMA2, LLAMA31, TIED, {"head_dim": 32}),
    "llama2-fsdp": (LLAMA2, FSDP),
}

ARCHITECTURES = {"mixtral": "mixtral", "envy": "mixtral", "llama2": "llama"}


@pytest.mark.parametrize("name", CASES)
def test_parameters_only(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name])
    run(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ARCHITECTURES[checkpoint.config["decoder_block"]]
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", "envy-tied", "envy-fsdp", "llama2-tied"])
def test_full_train_state(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name], full_state=True, step=3)
    manifest = run(checkpoint, tmp_path / "out")
    assert manifest.source.step == 3
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "envy-tied",
        "envy-untied",
        "envy-unscanned",
        "envy-step-3",
        "envy-wide-dense",
        "envy-all-moe",
        "envy-top-4",
        "envy-fsdp",
        "mixtral-tied",
        "mixtral-head-dim-24",
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


@pytest.mark.parametrize("name", ["mixtral-tied", "envy-tied", "llama2-tied"])
def test_untie(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name])
    run(checkpoint, tmp_path / "out", untie=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert_same_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("stored", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", ["mixtral-tied", "envy-tied", "llama2"])
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
