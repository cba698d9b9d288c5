"""What a config says: files, model names, defaults, flags."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from moeconv_train import recipe

from moeconv.arch.config_sources import (
    ResolvedConfig,
    from_config_file,
    from_flags,
    from_mapping,
    resolve_config,
)
from moeconv.arch.defaults import known_keys, maxtext_defaults
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.fields import TOLD_KEYS
from moeconv.arch.keys import function_keys, keys
from moeconv.arch.values import plain
from moeconv.errors import ConfigError

HERE = Provenance(Origin.CONFIG, "here")


def maxtext_configs() -> Path:
    spec = importlib.util.find_spec("maxtext")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "configs"


def test_packaged_defaults_are_those_of_the_installed_maxtext():
    base = yaml.safe_load((maxtext_configs() / "base.yml").read_text())
    packaged = maxtext_defaults()["base"]
    keys = {*TOLD_KEYS, *function_keys()} & set(base)
    assert keys <= set(packaged)
    for key in keys:
        value = None if base[key] == "None" else base[key]
        assert packaged[key] == (float(value) if key == "normalization_layer_epsilon" else value), (
            key
        )


def test_packaged_models_are_those_of_the_installed_maxtext():
    for name, packaged in maxtext_defaults()["models"].items():
        model = yaml.safe_load((maxtext_configs() / "models" / f"{name}.yml").read_text())
        for key, value in packaged.items():
            assert (
                value == pytest.approx(float(model[key]))
                if isinstance(value, float)
                else (value == model[key])
            )


def test_every_default_is_a_plain_model():
    """MaxText's own defaults must not refuse a model, or none could be converted."""
    base = maxtext_defaults()["base"]
    for name, key in function_keys().items():
        if name in base:
            assert key.is_neutral(base[name]), name


def test_keys_left_out_have_maxtexts_defaults(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("decoder_block: mixtral\nnormalization_layer_epsilon: 1e-6\n")
    told = from_config_file(path)
    assert told["normalization_layer_epsilon"].value == 1e-6  # YAML 1.1 reads it as text
    assert told["decoder_block"].provenance == Provenance(Origin.CONFIG, f"{path}:1")
    assert told["rope_max_timescale"].value == 10_000
    assert told["rope_max_timescale"].provenance.origin is Origin.DEFAULT
    assert not told["rope_max_timescale"].explicit


def test_a_model_name_wins_over_the_file_as_in_maxtext(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("model_name: mixtral-8x7b\nrope_max_timescale: 123\nmax_target_length: 77\n")
    told = from_config_file(path)
    assert told["rope_max_timescale"].value == 1_000_000
    assert told["rope_max_timescale"].provenance.origin is Origin.MODEL
    assert told["decoder_block"].value == "mixtral"
    assert told["max_target_length"].value == 77


def test_a_resolved_config_already_holds_the_outcome():
    told = from_mapping(
        {"model_name": "mixtral-8x7b", "emb_dim": 64, "rope_max_timescale": 123}, HERE
    )
    assert told["rope_max_timescale"].value == 123


def test_instruct_names_are_the_base_models(tmp_path):
    told = from_mapping({"model_name": "llama3.1-8b-Instruct"}, HERE)
    assert told["rope_max_timescale"].value == 500_000


def test_an_unknown_model_name_is_refused():
    with pytest.raises(ConfigError, match=r"our-own-6b.*mixtral-8x7b.*resolved config"):
        from_mapping({"model_name": "our-own-6b"}, HERE)


def test_base_config_chains(tmp_path):
    (tmp_path / "team.yml").write_text("base_config: base.yml\nrope_max_timescale: 5\n")
    (tmp_path / "run.yml").write_text("base_config: team.yml\nnum_experts_per_tok: 2\n")
    told = from_config_file(tmp_path / "run.yml")
    assert told["rope_max_timescale"].value == 5
    assert told["num_experts_per_tok"].value == 2


def test_a_circle_of_base_configs_ends(tmp_path):
    (tmp_path / "a.yml").write_text("base_config: b.yml\n")
    (tmp_path / "b.yml").write_text("base_config: a.yml\n")
    with pytest.raises(ConfigError, match="base_config"):
        from_config_file(tmp_path / "a.yml")


def test_packaged_keys_are_those_of_the_installed_maxtext():
    assert keys().keys() >= recipe.maxtext_keys()


@pytest.mark.parametrize(
    ("key", "meant"),
    [("rope_max_timescal", "rope_max_timescale"), ("num_expert_per_tok", "num_experts_per_tok"),
     ("decoder_blok", "decoder_block"), ("Rope-Max-Timescale", "rope_max_timescale"),
     ("base_num_decoder_layer", "base_num_decoder_layers"), ("eos_tokenid", "eos_token_id")],
)  # fmt: skip
def test_a_misspelt_key_is_refused(tmp_path, key, meant):
    path = tmp_path / "typo.yml"
    path.write_text(f"{key}: 2\n")
    words = rf"MaxText has no {key}; did you mean {meant}\?"
    with pytest.raises(ConfigError, match=rf"typo\.yml: {words}"):
        from_config_file(path)
    with pytest.raises(ConfigError, match=rf"here: {words}"):
        from_mapping({key: 2}, HERE)
    below = tmp_path / "run.yml"
    below.write_text("base_config: typo.yml\n")
    with pytest.raises(ConfigError, match=rf"run\.yml: {words}"):
        from_config_file(below)
    with pytest.raises(ConfigError, match=rf"--set.*{meant}" if "-" not in key else "key=value"):
        from_flags([f"{key}=2"])


@pytest.mark.parametrize(
    "key",
    ["enable_nnx", "pagedattn_num_pages", "index_n_heads", "wi_tile_fwd_buffer_count"],
)  # fmt: skip
def test_keys_of_other_releases_are_let_pass(key):
    assert set(from_mapping({key: 2}, HERE)) <= known_keys()


def test_enums_of_a_logged_config_are_understood():
    told = from_mapping(
        {
            "decoder_block": "DecoderBlockType.MIXTRAL",
            "rope_type": "RopeType.LLAMA3_1",
            "quantization": "QuantizationType.NONE",
        },
        HERE,
    )
    assert told["decoder_block"].value == "mixtral"
    assert told["rope_type"].value == "llama3.1"
    assert told["quantization"].value is None


def test_flags_win():
    told = ResolvedConfig(
        from_mapping({"rope_max_timescale": 1}, HERE), from_flags(["rope_max_timescale=2e5"])
    )
    assert told.value("rope_max_timescale") == 2e5
    assert told["rope_max_timescale"].provenance.origin is Origin.FLAG


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("rope_max_timescale", "key=value"),
        ("=3", "key=value"),
        ("lerning_rate_of_mine=3", "no such setting"),
        ("rope_type=[", "not a YAML value"),
    ],
)
def test_bad_flags(pair, words):
    with pytest.raises(ConfigError, match=words):
        from_flags([pair])


LINE = (
    "python3 -m maxtext.trainers.pre_train.train maxtext/configs/base.yml run_name=mine "
    "model_name=mixtral-8x7b rope_max_timescale=5e5 'mlp_activations=[silu, linear]' steps=10"
)


def test_a_command_line_of_maxtext_tells_what_it_told_maxtext():
    told = from_flags([LINE])
    assert told.value("decoder_block") == "mixtral"
    assert told.value("rope_max_timescale") == 500_000
    assert told.value("mlp_activations") == ["silu", "linear"]
    assert told.value("normalization_layer_epsilon") == 1e-5
    assert told["head_dim"].provenance.origin is Origin.MODEL
    assert {"run_name", "steps", "python3"} <= set(told.ignored)
    assert not {"model_name", "rope_max_timescale"} & set(told.ignored)


def test_one_value_with_spaces_is_no_command_line():
    assert from_flags(["mlp_activations=[silu, linear]"]).value("mlp_activations") == [
        "silu",
        "linear",
    ]


def test_a_command_line_on_a_config_of_its_own_is_not_read_in_part():
    with pytest.raises(ConfigError, match=r"builds on mine\.yml; give that file with --config"):
        from_flags(["python3 train.py mine.yml steps=3 rope_max_timescale=1e4"])


def test_a_model_name_makes_the_rest_maxtexts_defaults():
    told = from_flags(["model_name=default", "decoder_block=mixtral"])
    assert told.value("rope_max_timescale") == 10_000
    assert told["decoder_block"].explicit
    assert "head_dim" not in from_flags(["decoder_block=mixtral"])


@pytest.mark.parametrize("key", ["quantum_attention", "mesh_of_2031"])
def test_a_setting_that_nobody_knows_is_refused_until_it_is_accepted(key):
    with pytest.raises(ConfigError, match=f"here: moeconv does not know {key}, .*--accept-key"):
        resolve_config({key: 1, "decoder_block": "mixtral"}, HERE, ())
    told = resolve_config({key: 1, "decoder_block": "mixtral"}, HERE, (), accept=[key, "steps"])
    assert told.accepted == (key,)
    assert key not in told


@pytest.mark.parametrize(
    "line",
    [
        "run_name=x rope_max_timescale=5e5 2>&1",
        "run_name=x rope_max_timescale=5e5 | tee log",
        "run_name=don't rope_max_timescale=5e5",
        "run_name=$(date +%s) rope_max_timescale=5e5",
        "steps=3;rope_max_timescale=5e5",
    ],
)
def test_nothing_of_a_pasted_line_is_lost(line):
    with pytest.raises(ConfigError, match="rope_max_timescale would be lost"):
        from_flags([line])


def test_a_line_that_goes_on_is_one():
    told = from_flags(["python3 -m train base.yml run_name=x \\\n  rope_max_timescale=500000"])
    assert told.value("rope_max_timescale") == 500_000


def test_a_key_that_resembles_another_can_be_accepted():
    with pytest.raises(
        ConfigError, match=r"did you mean use_qk_norm\? .*--accept-key use_qk_norms"
    ):
        resolve_config({"use_qk_norms": False}, HERE, ())
    assert resolve_config({"use_qk_norms": False}, HERE, (), ["use_qk_norms"]).accepted == (
        "use_qk_norms",
    )


def test_a_neutral_value_is_neutral_as_it_is_read():
    """A resolved config has the word none, which MaxText and we read as nothing."""
    for name, key in function_keys().items():
        for value in key.neutral:
            assert key.is_neutral(plain(value)), name


@pytest.mark.parametrize(
    "section",
    [
        {"rope_max_timescale": 10_000},
        {"decoder_block": "qwen3"},
        {"model_name": "llama3-8b"},
        {"use_qk_norm": True},
    ],
)
def test_a_section_may_not_tell_what_the_top_tells(section):
    assert not keys()["student_overrides"].is_neutral(section)
