"""What of MaxText's deepseek block is converted, to what, and what is refused by name."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import synthetic

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import ConfigError, TensorError, UnsupportedError
from moeconv.families import blocks


@cache
def run_of(root):
    """One checkpoint for all tests that do not change it."""
    return synthetic.write(root / "deepseek", "deepseek")


def indexed(arrays):
    """As with `use_indexer`: three heads of six."""
    for name in [name for name in arrays if name.endswith("wq_b.kernel")]:
        place, stacked = name.removesuffix("wq_b.kernel") + "indexer.", arrays[name].shape[1]
        for part, shape in (
            ("wq_b.kernel", (11, stacked, 3, 6)),
            ("wk.kernel", (16, stacked, 6)),
            ("k_norm.scale", (6, stacked)),
            ("k_norm.bias", (6, stacked)),
            ("weights_proj.kernel", (16, stacked, 3)),
        ):
            arrays[place + part] = np.full(shape, 0.5, np.float32)


def planned(tmp_path, *, change=None, **changes):
    if change is None:
        made = run_of(tmp_path.parent)
    else:
        made = synthetic.write(tmp_path / "run", "deepseek", change=change)
    config = made.config_file(tmp_path, **changes)
    return plan_conversion(str(made.run), ConvertOptions(config=config))


def without_bias(arrays):
    for name in [name for name in arrays if name.endswith("gate.bias")]:
        del arrays[name]


PLAIN = {"routed_bias": False, "model_name": "default"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name": "default"}, "weighs the chosen experts with the router's bias, unless"),
        ({"model_name": "deepseek2-16b"}, "router's bias, unless model_name begins with deepseek3"),
        ({"routed_score_func": ""}, "routed_score_func=''; it scores experts by sigmoid"),
        ({"routed_score_func": "sqrtsoftplus"}, "routed_score_func='sqrtsoftplus'"),
        ({"routed_score_func": "softmax"}, "deepseek_v2: its router has a bias"),
        ({"n_routing_groups": 3, "topk_routing_group": 1}, "n_routing_groups=3 and .* 4 experts"),
        ({"n_routing_groups": 4, "topk_routing_group": 2}, "n_routing_groups=4 and .* 4 experts"),
        ({"n_routing_groups": 2, "topk_routing_group": -1}, "topk_routing_group=-1"),
        (
            {"n_routing_groups": 2, "topk_routing_group": 1, "num_experts_per_tok": 3},
            "1 of 2 groups have fewer experts than a token goes to",
        ),
        ({"routed_bias": False}, "routed_bias=false, but the checkpoint has a bias"),
        ({"normalization_layer_epsilon": 1e-5}, "epsilon=1e-05.*have 1e-06 in transformers"),
        ({"rope_interleave": False}, "rope_interleave=true"),
        ({"rope_attention_scaling": True}, "rope_attention_scaling=false"),
        ({"rope_type": "default"}, "rope_type=default .* not known of this decoder block"),
        ({"rope_type": "llama3.1"}, "rope_type=llama3.1 .* not known of this decoder block"),
        ({"norm_topk_prob": True}, "norm_topk_prob=true should be false"),
        ({"attention_type": "global"}, "attention_type=global should be mla"),
        ({"engram_layers": [1]}, "engram_layers"),
        ({"mhc_expansion_rate": 4}, "hyper-connections"),
        ({"mlp_activations_limit": 7.0}, "mlp_activations_limit"),
    ],
)
def test_what_no_target_computes_is_refused(tmp_path, changes, words):
    with pytest.raises(UnsupportedError, match=f"(?i){words}"):
        planned(tmp_path, **changes)


@pytest.mark.parametrize("told", ["the config", "the model's file"])
def test_a_bias_that_was_left_out_is_never_zeros(tmp_path, told):
    """As a parameters-only checkpoint of MaxText 0.2.5 leaves it out."""
    made = synthetic.write(tmp_path / "run", "deepseek", change=without_bias)
    config = made.config_file()
    if told == "the model's file":
        config = made.config_file(
            emb_dim=None, routed_bias=None, model_name="deepseek3-671b", num_experts_per_tok=None
        )
    options = ConvertOptions(config=config, sets=("num_experts_per_tok=2",))
    with pytest.raises(UnsupportedError, match=r"no bias of the router: .*convert the train state"):
        plan_conversion(str(made.run), options)


@pytest.mark.parametrize(
    ("key", "value"),
    [("first_num_dense_layers", 2), ("shared_experts", 1), ("use_indexer", True),
     ("q_lora_rank", 0), ("kv_lora_rank", 9), ("qk_rope_head_dim", 2), ("qk_nope_head_dim", 10),
     ("v_head_dim", 4), ("num_kv_heads", 2)],
)  # fmt: skip
def test_the_config_of_another_model_is_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"{key}=.*contradicts the checkpoint"):
        planned(tmp_path, **{key: value})


def test_maxtexts_head_dim_is_none_of_this_attentions(tmp_path):
    model = planned(tmp_path, head_dim=128).plan.model
    assert (model.head_dim, model.num_key_value_heads) == (10, model.num_attention_heads)
    assert (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim) == (6, 4, 5)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            ".wkv_a.kernel",
            "10 for qk_nope_head_dim \\+ qk_rope_head_dim, but .*qk_rope_head_dim is 18",
        ),
        (
            ".wkv_b.kernel",
            "10 for qk_nope_head_dim \\+ qk_rope_head_dim, but qk_nope_head_dim is 17",
        ),
        ("moe_layers.self_attention.wkv_a.kernel", "fit no scan axis"),
    ],
)
def test_sizes_that_do_not_add_up_are_refused(tmp_path, part, words):
    def change(arrays):
        for name in [name for name in arrays if part in name]:
            arrays[name] = np.concatenate([arrays[name]] * 2, axis=-1)

    with pytest.raises(TensorError, match=words):
        planned(tmp_path, change=change)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_routing_groups": 2, "topk_routing_group": 1}, (2, 1)),
        ({"n_routing_groups": -1}, (1, 1)),
        ({"n_routing_groups": 1, "topk_routing_group": 1}, (1, 1)),
    ],
)
def test_groups_of_experts(tmp_path, changes, expected):
    prepared = planned(tmp_path, **changes)
    convert(prepared, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == expected
    assert any("before 5.7" in line for line in prepared.plan.warnings) == (expected == (2, 1))


def test_another_name_ignores_groups_and_is_told_so(tmp_path):
    prepared = planned(
        tmp_path, change=without_bias, n_routing_groups=2, topk_routing_group=1, **PLAIN
    )
    assert any("n_routing_groups=2 has no effect" in line for line in prepared.plan.warnings)
    convert(prepared, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_group"] == 1


def test_a_kimi_of_before_it_routed_so_is_warned_of(tmp_path):
    assert any(
        "before 0.2.5" in w for w in planned(tmp_path, model_name="kimi-k2-1t").plan.warnings
    )
    warned = planned(tmp_path).plan.warnings
    assert not any("before 0.2.5" in line for line in warned)


@pytest.mark.parametrize(
    ("changes", "mscale"),
    [({}, 1.0), ({"mscale": 0.707}, 0.707), ({"mscale": 0}, 0.0),
     ({"original_max_position_embeddings": 163840}, 0.0)],
)  # fmt: skip
def test_yarn_scales_attention_where_it_stretches(tmp_path, changes, mscale):
    convert(planned(tmp_path, **changes), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for rope in (config["rope_parameters"], config["rope_scaling"]):
        assert (rope["mscale"], rope["mscale_all_dim"]) == (mscale, mscale)
        assert rope["attention_factor"] == 1.0
    assert config["max_position_embeddings"] == 163840


def test_groups_are_ranked_by_their_two_best_scores(tmp_path):
    model = planned(tmp_path, n_routing_groups=2, topk_routing_group=1).plan.model
    scores = np.array([[0.9, -0.5, 0.3, 0.2], [0.1, 0.2, -0.4, 0.9]])
    eligible = blocks()["deepseek"].taps.eligible
    assert eligible is not None
    assert eligible(scores, model).tolist() == [[False, False, True, True]] * 2
    model = replace(model, settings={**model.settings, "topk_routing_group": 2})
    assert eligible(scores, model).all()


INDEXER = {"use_indexer": True, "indexer_topk": 7}


def test_an_indexer_makes_it_a_deepseek_v32(tmp_path):
    prepared = planned(tmp_path, change=indexed, **INDEXER, indexer_sparse_training=True)
    convert(prepared, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    assert [config[f"index_{key}"] for key in ("n_heads", "head_dim", "topk")] == [3, 6, 7]
    assert not any("indexer" in text for text in prepared.plan.warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name": "default"}, "deepseek_v32: MaxText weighs the chosen experts with the rou"),
        ({"indexer_mask_exact_topk": False}, "indexer_mask_exact_topk=False may attend to more"),
        ({"indexer_use_approx_top_k": True}, "indexer_use_approx_top_k=True chooses keys approxi"),
    ],
)
def test_what_a_deepseek_v32_is_not_is_refused(tmp_path, changes, words):
    with pytest.raises(UnsupportedError, match=words):
        planned(tmp_path, change=indexed, **{**INDEXER, **changes})


def test_index_heads_smaller_than_what_is_rotated(tmp_path):
    def narrow(arrays):
        indexed(arrays)
        for name in [name for name in arrays if "indexer" in name and "weights" not in name]:
            arrays[name] = arrays[name].take(range(3), 0 if "k_norm" in name else -1)

    with pytest.raises(UnsupportedError, match="index heads have 3 entries, fewer than the 4"):
        planned(tmp_path, change=narrow, **INDEXER)


def test_a_wrong_number_of_index_heads_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"indexer_n_heads=64.*contradicts the checkpoint"):
        planned(tmp_path, change=indexed, **INDEXER, indexer_n_heads=64)
