"""The matrix: MaxText writes, moeconv converts, transformers computes MaxText's logits."""

import json

import pytest
from checkpoints import ROWS
from helpers import assert_same_model, run

ZARR2 = {"checkpoint_storage_use_zarr3": False}
NO_OCDBT = {"checkpoint_storage_use_zarr3": False, "checkpoint_storage_use_ocdbt": False}
FSDP = {"ici_fsdp_parallelism": 4}
EXPERTS = {"ici_expert_parallelism": 2, "ici_fsdp_parallelism": 2}

# A row's `model` differs from the lab's base (4 layers, 4 experts top-2, GQA 4:2, head_dim 16,
# hidden 48, fp32, RoPE theta 500,000, untied, scanned on axis 1, OCDBT + zarr3, one chunk an
# array), its `cases` from that. What has nothing to do with each other shares a case.
CASES = {name: (row.model,) for name, row in ROWS.items()}
CASES |= {
    f"{name}-{case}": (row.model, *changes)
    for name, row in ROWS.items()
    for case, changes in row.cases.items()
}
# Of other families only the first is in the default suite; the rest is a proof.
USUAL = ("mixtral", "envy", "llama2")
PROVEN = {f"{n}-{case}" for n, row in ROWS.items() if n not in USUAL for case in row.cases}
# What moves no value: the model, how else it is written, and whether as a whole train state.
STORED = {
    "mixtral-zarr2": ("mixtral-tied", ZARR2, False),
    "mixtral-no-ocdbt": ("mixtral", NO_OCDBT, False),
    "mixtral-fsdp": ("mixtral-tied", FSDP, False),
    "mixtral-experts-sharded": ("mixtral", EXPERTS, False),
    "mixtral-state": ("mixtral", {}, True),
    "envy-fsdp": ("envy-tied", FSDP, False),
    "envy-experts-sharded": ("envy", EXPERTS, False),
    "envy-state": ("envy-tied", {}, True),
    "envy-fsdp-state": ("envy-tied", FSDP, True),
    "llama2-fsdp": ("llama2", FSDP, False),
    "llama2-state": ("llama2-llama3.1-rope-tied", {}, True),
    "deepseek_v3-state": ("deepseek_v3", {}, True),
}

MODEL_TYPES = {
    f"{name}-{case}": kind for name, row in ROWS.items() for case, kind in row.other_types.items()
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.proof("matrix of families")])
        if name in PROVEN
        else name
        for name in CASES
    ],
)
def test_the_logits_are_maxtexts(maxtext_lab, tmp_path, name):
    checkpoint = maxtext_lab.checkpoint(*CASES[name])
    run(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    row = ROWS[name.partition("-")[0]]
    assert config["model_type"] == MODEL_TYPES.get(name, row.model_type)
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
        "envy",
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
