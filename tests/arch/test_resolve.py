"""The description: who tells what, what contradicts what, what is still missing."""

import json
from dataclasses import replace

import pytest
import synthetic

from moeconv.arch import detection as layouts
from moeconv.arch.config_sources import ResolvedConfig, from_flags, from_mapping
from moeconv.arch.defaults import maxtext_defaults
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.keys import function_keys
from moeconv.arch.layout import build_layout
from moeconv.arch.parameters import DENSE, MOE
from moeconv.arch.resolve import resolve
from moeconv.arch.stacks import CYCLED
from moeconv.errors import ConfigError, TensorError, UnsupportedError
from moeconv.families import blocks
from moeconv.maxtext import checkpoint as source

SIZES = {"V": 32, "D": 16, "H": 4, "K": 2, "h": 8, "E": 4, "M": 24, "F": 40}
ENVY = blocks()["envy"]


def shapes(kinds="DM", depth=2, axis=1, tied=True, **sizes):
    """Shapes of a scanned envy checkpoint."""
    kinds = [{"D": DENSE, "M": MOE}[letter] for letter in kinds]
    made = build_layout(
        ENVY, CYCLED, kinds * depth, SIZES | sizes, blocks=[(len(kinds), depth)],
        scan_axis=axis, tied=tied,
    )  # fmt: skip
    return {array.path: array.shape for array in made.arrays}


def detect_layout(found, **options):
    return layouts.detect_layout(found, [ENVY], **options)


HERE = Provenance(Origin.CONFIG, "run.yml")


def told(*flags, **config):
    base = {"decoder_block": "envy", "num_experts_per_tok": 2}
    where = Provenance(Origin.CONFIG, "run.yml")
    return ResolvedConfig(from_mapping(base | config, where), from_flags(flags))


def test_shapes_tell_the_sizes():
    model = resolve(detect_layout(shapes()), told()).model()
    assert (model.hidden_size, model.num_attention_heads, model.num_key_value_heads) == (16, 4, 2)
    assert (model.head_dim, model.vocab_size, model.num_experts) == (8, 32, 4)
    assert (model.intermediate_size, model.moe_intermediate_size) == (40, 24)
    assert model.layer_kinds == ("dense", "moe", "dense", "moe")
    assert model.tie_word_embeddings
    assert model.sources["hidden_size"].origin is Origin.SHAPE
    assert "token_embedder" in model.sources["vocab_size"].detail


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_every_scan_axis(axis):
    layout = detect_layout(shapes(axis=axis))
    assert layout.scan_axis == axis
    assert layout.stacking is CYCLED
    assert layout.kinds == ("dense", "moe") * 2


def test_an_ambiguous_scan_axis_must_be_told():
    cubes = {
        path: (16,) * len(shape) if "layers" in path else shape
        for path, shape in shapes(kinds="D", depth=16).items()
    }
    with pytest.raises(ConfigError, match=r"fit a layer axis at 1 and 0.*--set param_scan_axis=1"):
        detect_layout(cubes)
    assert detect_layout(cubes, scan_axis=0).scan_axis == 0


def test_a_scan_axis_that_contradicts_the_shapes():
    with pytest.raises(ConfigError, match="param_scan_axis is 0"):
        detect_layout(shapes(axis=1), scan_axis=0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"base_emb_dim": 32}, "base_emb_dim=32.*hidden_size is 16"),
        ({"base_num_query_heads": 8}, "num_attention_heads is 4"),
        ({"num_kv_heads": 4}, "num_key_value_heads is 2"),
        ({"head_dim": 16}, "head_dim is 8"),
        ({"vocab_size": 128256}, "vocab_size is 32"),
        ({"num_experts": 8}, "num_experts is 4"),
        ({"base_mlp_dim": 24}, "intermediate_size is 40"),
        ({"base_moe_mlp_dim": 40}, "moe_intermediate_size is 24"),
        ({"base_num_decoder_layers": 6}, "num_hidden_layers is 4"),
        ({"logits_via_embedding": False}, "tie_word_embeddings is true"),
        ({"scan_layers": False}, "scan_layers is true"),
        ({"num_experts_per_tok": 5}, "more than the 4 experts"),
        ({"rope_max_timescale": -1}, "rope_max_timescale=-1.*number > 0"),
        ({"normalization_layer_epsilon": "tiny"}, "number > 0"),
        ({"num_experts_per_tok": 1.5}, "whole number"),
        ({"normalize_embedding_logits": "maybe"}, "true or false"),
        ({"rope_type": "linear"}, "default, llama3.1 or yarn"),
    ],
)
def test_contradictions(config, words):
    with pytest.raises(ConfigError, match=words):
        resolve(detect_layout(shapes()), told(**{"inhomogeneous_layer_cycle_interval": 2} | config))


def test_a_default_contradicts_nothing():
    """A partial config leaves sizes to MaxText's defaults, which are not this model's."""
    assert told()["base_emb_dim"].value == 2048
    assert resolve(detect_layout(shapes()), told()).model().hidden_size == 16


def test_base_sizes_are_scaled_as_maxtext_scales_them():
    config = {
        "global_parameter_scale": 8,
        "base_emb_dim": 8,
        "base_num_query_heads": 2,
        "base_num_kv_heads": 1,
        "base_mlp_dim": 20,
        "base_moe_mlp_dim": 12,
        "base_num_decoder_layers": 2,
    }
    resolve(detect_layout(shapes()), told(inhomogeneous_layer_cycle_interval=2, **config)).model()
    with pytest.raises(ConfigError, match="base_mlp_dim"):
        resolve(detect_layout(shapes()), told(**config | {"base_mlp_dim": 40}))


def test_layers_that_a_scan_drops_are_no_contradiction():
    """MaxText silently builds 4 layers of 5 when the cycle is 2; the checkpoint is right."""
    config = {"base_num_decoder_layers": 5, "inhomogeneous_layer_cycle_interval": 2}
    resolution = resolve(detect_layout(shapes()), told(**config))
    assert resolution.model().num_hidden_layers == 4
    assert any("5 (config file: run.yml), but MaxText built 4" in w for w in resolution.warnings)
    whole = resolve(detect_layout(shapes()), told(**config | {"base_num_decoder_layers": 4}))
    assert not any("MaxText built" in text for text in whole.warnings)


def test_llama31_model_names_switch_the_rope():
    told_ = told(model_name="llama3.1-8b", emb_dim=16, num_decoder_layers=4,
                 inhomogeneous_layer_cycle_interval=2)  # fmt: skip
    model = resolve(detect_layout(shapes()), told_).model()
    assert model.rope_type == "llama3.1"
    assert model.rotary == "interleaved"


YARN = {"rope_type": "yarn", "rope_factor": 4, "original_max_position_embeddings": 32}


def with_yarn(**config):
    """What is made of a config by a block whose targets know YaRN."""
    block = replace(ENVY, ropes=("default", "llama3.1", "yarn"))
    return resolve(layouts.detect_layout(shapes(), [block]), told(**YARN, **config)).model()


def test_yarn_is_described_by_its_settings():
    model = with_yarn()
    assert model.settings == {
        "rope_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_positions": 163840,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "rope_truncate": True,
        "rope_interleave": True,
        "rope_attention_scaling": False,
    }
    assert model.rotary == "interleaved"
    assert with_yarn(rope_interleave=False).rotary == "half"
    assert str(model.sources["rope_factor"]).startswith("config file")
    assert str(model.sources["beta_fast"]).startswith("MaxText default")


def test_positions_behind_yarns_table_are_refused():
    """MaxText would look up the last one for each of them, and say nothing."""
    with pytest.raises(UnsupportedError, match="max_target_length=65 is more than"):
        with_yarn(max_target_length=65, max_position_embeddings=64)


def test_yarn_is_refused_where_the_targets_do_not_know_it():
    with pytest.raises(UnsupportedError, match=r"rope_type=yarn .* not known of this"):
        resolve(detect_layout(shapes()), told(**YARN)).model()


def test_untold_fields_are_all_named_with_the_three_ways():
    resolution = resolve(detect_layout(shapes()), ResolvedConfig(from_flags([])))
    with pytest.raises(ConfigError) as caught:
        resolution.model()
    text = str(caught.value)
    for key in (
        "decoder_block",
        "num_experts_per_tok",
        "rope_max_timescale",
        "rope_type",
        "normalization_layer_epsilon",
        "normalize_embedding_logits",
        "max_target_length",
    ):
        assert key in text
    for way in ("--config", "--set", "moeconv_run.json"):
        assert way in text


def test_flags_alone_can_tell_everything():
    flags = {
        "decoder_block": "envy", "num_experts_per_tok": 2, "normalize_embedding_logits": "true",
        "rope_type": "default", "rope_max_timescale": 10000, "normalization_layer_epsilon": 1e-5,
        "max_target_length": 64,
    }  # fmt: skip
    pairs = [f"{k}={v}" for k, v in flags.items()]
    first = resolve(detect_layout(shapes()), from_flags(pairs))
    with pytest.raises(ConfigError, match=rf"whether {len(first.missing)} other settings"):
        first.model()
    assert set(first.missing) <= function_keys().keys()
    defaults = maxtext_defaults()["base"]
    each = [f"{key}={json.dumps(defaults[key])}" for key in first.missing]
    for more in (["model_name=default"], each):
        assert resolve(detect_layout(shapes()), from_flags(pairs + more)).model().rope_theta == 1e4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"final_logits_soft_cap": 30.0}, "caps the tied logits"),
        ({"routed_score_func": "sigmoid"}, "scores experts"),
        ({"mlp_activations": ["gelu", "linear"]}, "SwiGLU"),
        ({"moba": True}, "chosen by a router"),
        ({"rope_min_timescale": 2}, "shortest timescale"),
        ({"attention_type": "block_diffusion"}, "otherwise than causally"),
    ],
)
def test_semantics_no_target_holds_are_refused(config, words):
    with pytest.raises(UnsupportedError, match=words):
        resolve(detect_layout(shapes()), told(**config)).model()


@pytest.mark.parametrize(
    "config",
    [
        {"capacity_factor": 1.25},
        {"sliding_window_size": 128},
        {"shared_experts": 1},
        {"attn_logits_soft_cap": 50.0},
        {"quantization": "int8"},
    ],
)
def test_semantics_to_know_of_are_warned_about(config):
    resolution = resolve(detect_layout(shapes()), told(**config))
    (key,) = config
    assert any(text.startswith(key) for text in resolution.warnings)
    resolution.model()


def test_a_soft_cap_on_untied_logits_is_not_applied_by_maxtext_either():
    resolve(detect_layout(shapes(tied=False)), told(final_logits_soft_cap=30.0)).model()


@pytest.mark.parametrize(
    ("block", "error", "words"),
    [
        (
            "mamba",
            UnsupportedError,
            r"mamba .*run.yml\) is not supported; .* converts deepseek, envy, ",
        ),
        ("simple", UnsupportedError, r"simple .* is not converted: its layers are one matrix each"),
        ("mixtral", ConfigError, r"decoder_block=mixtral .*other parameters than .* one of envy"),
        ("llama2", ConfigError, r"decoder_block=llama2 .*other parameters than .* one of envy"),
    ],
)
def test_another_decoder_block_is_refused_by_name(block, error, words):
    with pytest.raises(error, match=words):
        source._layout(shapes(), told(decoder_block=block))


def test_checkpoint_metadata_that_contradicts_the_structure():
    with pytest.raises(TensorError, match="scan_layers=false"):
        resolve(detect_layout(shapes()), told(), scan_layers=False)


def test_token_ids_must_be_rows_of_the_embedding():
    with pytest.raises(ConfigError, match=r"bos_token_id=128000.*32"):
        resolve(detect_layout(shapes()), told("bos_token_id=128000"))
    model = resolve(detect_layout(shapes()), told("eos_token_id=3")).model()
    assert model.eos_token_id == 3


@pytest.mark.parametrize(
    ("block", "key"),
    [("qwen2", "attention_bias"), ("qwen3", "use_qk_norm"), ("qwen3_moe", "use_qk_norm")],
)
def test_a_setting_that_shows_in_the_parameters_is_told_by_them(block, key):
    layout = synthetic.layout_of(block, layers=2)
    base = {"decoder_block": block, "num_experts_per_tok": 2}

    def resolved(**config):
        return resolve(layout, ResolvedConfig(from_mapping(base | config, HERE))).model()

    assert resolved() == resolved(**{key: True})
    with pytest.raises(
        ConfigError, match=f"{key}=False .*contradicts the checkpoint.*{key} is true"
    ):
        resolved(**{key: False})
