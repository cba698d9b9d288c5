"""config.json says the same to every reader."""

from dataclasses import replace

import pytest
import synthetic

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import DENSE, MOE
from moeconv.conversion.api import ConvertOptions, plan_conversion
from moeconv.families import blocks, target_for, targets
from moeconv.hf.config import generation_config, model_config, to_json
from moeconv.mapping.edges import cannot_hold
from moeconv.mapping.rules import Options

D, M = DENSE, MOE
MODEL = ModelDescription(
    decoder_block="envy", hidden_size=768, num_attention_heads=12, num_key_value_heads=12,
    head_dim=64, vocab_size=128256, layer_kinds=(D, M) * 3, intermediate_size=3072,
    moe_intermediate_size=3072, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=True,
    normalize_embedding_logits=True, rope_type="default", rope_theta=500000.0,
    rope_use_scale=False, rms_norm_eps=1e-5, max_position_embeddings=2048,
    bos_token_id=128000, eos_token_id=128001,
)  # fmt: skip


def config(target="mixtral", untie=False, **changes):
    return model_config(
        targets()[target], replace(MODEL, **changes), "float32", Options(untie=untie)
    )


@pytest.mark.parametrize("block", synthetic.BLOCKS)
def test_both_spellings_agree(block, tmp_path):
    made = synthetic.write(tmp_path / "run", block)
    options = ConvertOptions(config=made.config_file())
    model = plan_conversion(str(made.run), options).plan.model
    for name in blocks()[block].targets:
        page = targets()[name]
        if cannot_hold(page, model):
            continue
        written = model_config(page, model, "float32", Options())
        if model.num_positions:  # nothing rotates
            assert not any("rope" in key for key in written)
            continue
        rope = written["rope_parameters"]  # one, or one for each type of layer
        ropes = [rope] if "rope_theta" in rope else list(rope.values())
        assert {each["rope_theta"] for each in ropes} == {500000.0}
        assert written.get("rope_theta", 500000.0) == 500000.0
        assert written["torch_dtype"] == written["dtype"] == "float32"
        assert written["architectures"] == [page.architecture]
        if "head_dim" in written:
            assert written["head_dim"] == model.head_dim


def test_scaled_rope_is_written_for_both_generations():
    written = config("llama", rope_type="llama3.1", rope_use_scale=True)
    scaling = written["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert written["rope_parameters"] == {**scaling, "rope_theta": 500000.0}
    plain = config("llama", rope_type="llama3.1", rope_use_scale=False)
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"]["rope_type"] == "default"


def test_tying():
    assert config()["tie_word_embeddings"] is True
    assert config(untie=True)["tie_word_embeddings"] is False
    assert config(tie_word_embeddings=False)["tie_word_embeddings"] is False


def test_mixtral_never_slides():
    assert config()["sliding_window"] is None


def test_ernie_places_experts_explicitly():
    written = config("ernie4_5_moe")
    assert (written["moe_layer_interval"], written["moe_layer_start_index"]) == (2, 1)
    assert written["moe_layer_end_index"] == 5
    assert (written["moe_k"], written["moe_num_experts"]) == (2, 8)
    assert written["moe_num_shared_experts"] == 0
    assert "num_experts_per_tok" not in written


@pytest.mark.parametrize(
    ("kinds", "fits"),
    [
        ((D, M) * 3, True),
        ((D, D, M) * 2, True),
        ((M,) * 4, True),
        ((D, D, D, M), True),
        ((D, M, D, D, M, D), False),
        ((D, M, D, D, D, M), False),
        ((M, D, M, D), False),
        ((D,) * 4, False),
    ],
)
def test_ernie_refuses_what_it_cannot_place(kinds, fits):
    reason = cannot_hold(targets()["ernie4_5_moe"], replace(MODEL, layer_kinds=kinds))
    assert (reason is None) == fits


def test_targets_follow_the_layers():
    assert target_for(MODEL).name == "mixtral"
    dense = replace(MODEL, layer_kinds=(D,) * 4)
    assert target_for(dense).name == "llama"
    assert "no Mixture-of-Experts layer" in str(cannot_hold(targets()["mixtral"], dense))
    assert "no moe layers" in str(cannot_hold(targets()["llama"], MODEL))


def test_token_ids_nobody_told_are_left_out_of_generation():
    assert generation_config(targets()["llama"], MODEL)["eos_token_id"] == 128001
    assert "pad_token_id" not in generation_config(targets()["llama"], MODEL)
    assert config()["pad_token_id"] is None


def test_the_same_config_is_the_same_bytes():
    assert to_json(config()) == to_json(config())
    assert to_json(config()).endswith(b"}\n")
