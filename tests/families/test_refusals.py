"""What a family's target cannot hold is refused by name, and so is what its config does not say."""

import numpy as np
import pytest
import synthetic

from moeconv.conversion.api import ConvertOptions, plan_conversion
from moeconv.errors import ConfigError, TensorError, UnsupportedError


def plan(folder, block, *, change=lambda arrays: None, sizes=None, scanned=True, **told):
    """The plan of a checkpoint without MaxText; None takes a key out of its config."""
    made = synthetic.write(folder / "run", block, change=change, sizes=sizes, scanned=scanned)
    options = ConvertOptions(config=made.config_file(**told))
    return plan_conversion(str(made.run), options).plan


@pytest.mark.parametrize(
    ("block", "told", "error", "words"),
    [
        ("gpt_oss", {"sliding_window_size": None}, ConfigError,
         r"sliding_window_size=0 .MaxText default.* a whole number ≥ 1"),
        ("gpt_oss", {"mlp_activations_limit": None}, ConfigError,
         r"mlp_activations_limit=-1.0 .* a number > 0"),
        ("gpt_oss", {"mlp_activations": None}, UnsupportedError,
         r"mlp_activations=\['silu', 'linear'\] should be .*sigmoid.*linear"),
        ("gpt_oss", {"attention_sink": False}, ConfigError, "attention_sink is true"),
        ("gpt_oss", {"routed_bias": False}, ConfigError, "routed_bias is true"),
        ("gpt_oss", {"routed_score_func": "sigmoid"}, UnsupportedError, "routed_score_func=sigm"),
        ("gpt_oss", {"rope_type": "yarn", "max_position_embeddings": 63}, UnsupportedError,
         "max_target_length=64 is more than max_position_embeddings=63"),
        ("gpt_oss", {"padded_base_moe_mlp_dim": 32}, UnsupportedError, "padded_base_moe_mlp_dim"),
        ("llama4", {"chunk_attn_window_size": None}, ConfigError,
         r"chunk_attn_window_size=0 .* a whole number ≥ 1"),
        ("llama4", {"nope_layer_interval": 1.5}, ConfigError, "nope_layer_interval=1.5"),
        ("llama4", {"num_experts_per_tok": 2}, UnsupportedError, "the score of one expert"),
        ("llama4", {"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob=True"),
        ("llama4", {"capacity_factor": 1.25}, UnsupportedError, "capacity_factor=1.25"),
        ("llama4", {"shared_experts": 2}, ConfigError, "shared_experts is 1"),
        ("llama4", {"use_multimodal": True}, UnsupportedError, "use_multimodal=True"),
        ("llama4", {"rope_type": "yarn"}, UnsupportedError, "rope_type=yarn"),
        ("olmo3", {"sliding_window_size": None, "emb_dim": None, "model_name": None}, ConfigError,
         r"sliding_window_size=0"),
        ("olmo3", {"rope_type": "yarn"}, UnsupportedError, "rope_interleave is true"),
        ("olmo3", {"rope_type": "llama3.1"}, UnsupportedError, "rope_type=llama3.1"),
        ("olmo3", {"use_qk_norm": False}, ConfigError, "use_qk_norm is true"),
        ("gemma4", {"sliding_window_size": None}, ConfigError, "sliding_window_size=0"),
        ("gemma4", {"mlp_activations": None}, UnsupportedError, "mlp_activations=.*'gelu'"),
        ("gemma4", {"v_norm_with_scale": None}, UnsupportedError, "v_norm_with_scale=True should"),
        ("gemma4", {"normalization_layer_epsilon": 1e-5}, UnsupportedError, "1e-6 for the norms"),
        ("gemma4", {"norm_topk_prob": False}, UnsupportedError, "norm_topk_prob is false"),
        ("gemma4", {"model_name": "default"}, UnsupportedError, "halves of that part"),
        ("gemma4", {"model_name": "olmo3-7b"}, UnsupportedError, "code of its own"),
        ("gemma4", {"global_rope_proportion": 1.5}, ConfigError, "above 0, at most 1"),
        ("gemma4", {"global_head_dim": 5}, ConfigError, "global_head_dim is 6"),
        ("gemma4", {"global_head_dim": 0}, ConfigError, "global_head_dim is 6"),
        ("gemma4", {"share_kv_projections": False}, ConfigError, "share_kv_projections is true"),
        ("gemma4", {"shared_experts": 2}, ConfigError, "shared_experts is 1"),
        ("gemma4", {"attn_logits_soft_cap": 50.0}, UnsupportedError, "attn_logits_soft_cap=50"),
        ("gemma4", {"rope_type": "llama3.1"}, UnsupportedError, "rope_type=llama3.1"),
        ("gemma4_small", {"v_norm_with_scale": None}, UnsupportedError, "v_norm_with_scale=True"),
        ("gemma4_small", {"model_name": "gemma4-e4b"}, UnsupportedError,
         "10 layers, no multiple of six"),
        ("gemma4_small", {"num_kv_shared_layers": 2}, ConfigError, "num_kv_shared_layers is 3"),
        ("gemma4_small", {"use_double_wide_mlp": False}, ConfigError,
         "use_double_wide_mlp is true"),
        ("gemma4_small", {"hidden_size_per_layer_input": 8}, ConfigError,
         "hidden_size_per_layer_input is 7"),
        ("gemma4_small", {"normalization_layer_epsilon": 1e-5}, UnsupportedError, "1e-6 for the"),
        ("gpt3", {"mlp_activations": None}, UnsupportedError, "should be .'gelu'"),
        ("gpt3", {"max_target_length": 73}, UnsupportedError, "only 72 positions are learned"),
        ("gpt3", {"trainable_position_size": 64}, ConfigError, "num_positions is 72|trainable_po"),
        ("gpt3", {"fused_qkv": False}, ConfigError, "fused_qkv is true"),
        ("gpt3", {"use_untrainable_positional_embedding": True}, UnsupportedError,
         "use_untrainable_positional_embedding=True"),
        ("gpt3", {"rope_type": "llama3.1"}, UnsupportedError, "rope_type=llama3.1"),
        ("qwen3_next", {"use_qk_norm": True}, UnsupportedError, "use_qk_norm=True should be False"),
        ("qwen3_next", {"use_qk_norm_in_gdn": False}, UnsupportedError, "use_qk_norm_in_gdn=Fal"),
        ("qwen3_next", {"gdn_num_key_heads": 4}, UnsupportedError,
         "make 20 columns of keys, the convolution has 10"),
        ("qwen3_next", {"gdn_num_key_heads": None}, UnsupportedError, "gdn_num_key_heads=16"),
        ("qwen3_next", {"gdn_value_head_dim": 4}, ConfigError, "gdn_value_head_dim is 3"),
        ("qwen3_next", {"inhomogeneous_layer_cycle_interval": 2}, ConfigError,
         "inhomogeneous_layer_cycle_interval is 3"),
        ("qwen3_next", {"partial_rotary_factor": 0}, ConfigError, "should be a number > 0"),
        ("qwen3_next", {"rope_type": "yarn"}, UnsupportedError, "rope_type=yarn"),
        ("qwen3_5", {"use_multimodal": True}, UnsupportedError, "use_multimodal=True"),
        ("qwen3_moe", {"decoder_block": "qwen3_custom_moe"}, UnsupportedError,
         "decoder_block=qwen3_custom_moe .* is not converted: "),
    ],
)  # fmt: skip
def test_a_setting_is_refused_by_name(tmp_path, block, told, error, words):
    with pytest.raises(error, match=words):
        plan(tmp_path, block, **told)


def without(*words):
    def change(arrays):
        for name in [name for name in arrays if any(word in name for word in words)]:
            del arrays[name]

    return change


@pytest.mark.parametrize(
    ("block", "gone"),
    [("gpt_oss", "sinks"), ("gpt_oss", "wi_0_bias"), ("gpt_oss", "gate.bias"),
     ("gpt_oss", "out.bias"), ("llama4", "shared_experts.wo"), ("olmo3", "key_norm"),
     ("qwen3_next", "A_log"), ("qwen3_next", "shared_expert_gate")],
)  # fmt: skip
def test_a_model_without_what_the_target_always_has(tmp_path, block, gone):
    with pytest.raises(TensorError, match=rf"is not a whole .* layer:\n  missing .*{gone}"):
        plan(tmp_path, block, change=without(gone))


@pytest.mark.parametrize("scanned", [True, False])
def test_a_gemma4_whose_last_layer_has_a_window(tmp_path, scanned):
    """Eight layers are a block and two of another, which has no global one."""

    def two_more(arrays):
        for name in list(arrays):
            if not scanned and ".layers_0." in name:
                for n in (6, 7):
                    arrays[name.replace("layers_0", f"layers_{n}")] = arrays[name]
            if ".scanned_blocks.local_layers." in name:
                rest = name.replace("scanned_blocks", "layers_remainder")
                arrays[rest] = arrays[name].take(0, 1).take([0, 1], 1)  # two of the five

    with pytest.raises(UnsupportedError, match="8 layers, no multiple of six"):
        plan(tmp_path, "gemma4", change=two_more, scanned=scanned)


def test_a_gpt3_without_learned_positions(tmp_path):
    with pytest.raises(TensorError, match=r"lacks decoder\.position_embedder"):
        plan(tmp_path, "gpt3", change=without("position_embedder"))


def test_a_gpt3_whose_heads_are_wider_than_the_model(tmp_path):
    with pytest.raises(UnsupportedError, match=r"4 heads of 6 are 24 wide together.* 16"):
        plan(tmp_path, "gpt3", sizes={"h": 6})


def test_a_small_gemma4_whose_tokens_have_no_input(tmp_path):
    with pytest.raises(UnsupportedError, match="is 60, so that tokens from there to 64 have no"):
        plan(tmp_path, "gemma4_small", sizes={"U": 60})


def test_a_small_gemma4_with_inputs_of_another_number_of_layers(tmp_path):
    with pytest.raises(UnsupportedError, match=r"of its 10 layers are 77 wide.*not 10 times 7"):
        plan(tmp_path, "gemma4_small", sizes={"A": 77})


def test_a_small_gemma4_whose_windows_are_not_where_its_name_has_them(tmp_path, monkeypatch):
    """Twelve layers, of which a global one is the sixth; the name puts the fifth there."""
    kinds = (*("sliding dense",) * 5, "global dense") * 5
    monkeypatch.setitem(synthetic.PATTERNS, "gemma4_small", kinds)
    with pytest.raises(UnsupportedError, match=r"window are not where .* model_name=gemma4-e2b"):
        plan(tmp_path, "gemma4_small", sizes={"A": 210})


def test_a_small_gemma4_that_reuses_the_keys_of_no_layer(tmp_path, monkeypatch):
    kinds = (*("sliding dense",) * 4, "global dense+reuse")
    monkeypatch.setitem(synthetic.PATTERNS, "gemma4_small", kinds)
    with pytest.raises(UnsupportedError, match="are not its last, behind one of each attention"):
        plan(tmp_path, "gemma4_small", sizes={"A": 35})


def per_head(arrays):
    for name in [name for name in arrays if "_norm.scale" in name and "attention." in name]:
        if name.endswith(("query_norm.scale", "key_norm.scale")):
            arrays[name] = np.ascontiguousarray(arrays[name][..., :4])


def test_an_olmo3_of_another_name_normalises_each_head_apart(tmp_path):
    told = {"model_name": None, "emb_dim": None}
    with pytest.raises(UnsupportedError, match=r"4 and 4 entries, not 16 and 8.*begins with olmo3"):
        plan(tmp_path, "olmo3", change=per_head, scanned=False, **told)


def test_shared_experts_of_another_width(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ONE_WIDTH", frozenset())
    with pytest.raises(UnsupportedError, match="48 columns together, a routed one 24"):
        plan(tmp_path, "llama4", shared_experts=2)


def test_what_other_loaders_do_not_read_is_a_warning(tmp_path):
    """A limit of its own, and windows that begin anew in each scanned block."""
    plain = plan(tmp_path / "plain", "gpt_oss", scanned=False)
    assert not any("clip" in text or "every other" in text for text in plain.warnings)
    limit = plan(tmp_path / "limit", "gpt_oss", scanned=False, mlp_activations_limit=6)
    assert any("clip a GPT-OSS at 7" in text for text in limit.warnings)
    blocks_of_one = plan(tmp_path / "one", "gpt_oss", inhomogeneous_layer_cycle_interval=1)
    assert blocks_of_one.model.settings["layer_types"] == ("sliding_attention",) * 4
    assert any("every other layer" in text for text in blocks_of_one.warnings)


@pytest.mark.parametrize("block", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_head_that_sglang_does_not_tie_is_a_warning(tmp_path, block):
    made = synthetic.write(tmp_path, block, scanned=False)

    def warned(untie: bool) -> list[str]:
        options = ConvertOptions(config=made.config_file(), untie=untie)
        planned = plan_conversion(str(made.step_dir), options).plan
        return [text for text in planned.warnings if "SGLang" in text]

    (text,) = warned(untie=False)
    assert "--untie" in text
    assert not warned(untie=True)
