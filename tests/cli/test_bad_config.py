"""What is told of the model and is wrong, missing or unreadable, and flags that are."""

import json
import re

import pytest
import yaml
from cli_runner import moeconv
from refusals import CLICK_USAGE, convert, out_of, refused

from moeconv.errors import ConfigError, UnsupportedError, UsageError


@pytest.mark.parametrize(
    ("key", "value"),
    [("base_emb_dim", 32), ("base_num_query_heads", 8), ("base_num_kv_heads", 4), ("head_dim", 8),
     ("vocab_size", 128), ("base_num_decoder_layers", 6), ("base_mlp_dim", 96),
     ("num_experts", 8), ("logits_via_embedding", False), ("scan_layers", False),
     ("emb_dim", 32), ("num_decoder_layers", 6), ("vocab_size", "many"), ("head_dim", [8])],
)  # fmt: skip
def test_a_config_that_contradicts_the_shapes(checkpoint, key, value):
    words = (f"{key}={value}", "config.yml", "contradicts the checkpoint")
    ran = convert(checkpoint, told={key: value})
    refused(ran, ConfigError, *words, out=out_of(checkpoint))
    ran = convert(checkpoint, "--set", f"{key}={json.dumps(value)}")
    refused(ran, ConfigError, f"{key}={value}", "--set", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("decoder_block", "mamba", ["mamba", "moeconv converts ", "envy", "llama2", "mistral"]),
        ("decoder_block", "simple", ["simple"]),
        ("decoder_block", ["mixtral"], ["moeconv converts ", "envy", "llama2", "mistral"]),
    ],
)
def test_an_unknown_decoder_block(checkpoint, key, value, words):
    ran = convert(checkpoint, told={key: value})
    refused(ran, UnsupportedError, *words, out=out_of(checkpoint))


def test_a_decoder_block_of_another_kind(checkpoint, made, tmp_path):
    ran = convert(checkpoint, told={"decoder_block": "llama2"})
    refused(
        ran,
        ConfigError,
        "decoder_block=llama2",
        "other parameters than the checkpoint",
        "one of envy",
        out=out_of(checkpoint),
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_experts_per_tok", 5, ["num_experts_per_tok=5", "more than the 4 experts"]),
        ("num_experts_per_tok", 0, ["a whole number ≥ 1"]),
        ("num_experts_per_tok", 1.5, ["a whole number ≥ 1"]),
        ("num_experts_per_tok", True, ["a whole number ≥ 1"]),
        ("num_experts_per_tok", "two", ["a whole number ≥ 1"]),
        ("num_experts_per_tok", float("inf"), ["a whole number ≥ 1"]),
        ("num_experts_per_tok", [2], ["a whole number ≥ 1"]),
        ("rope_max_timescale", 0, ["a number > 0"]),
        ("rope_max_timescale", -1, ["a number > 0"]),
        ("rope_max_timescale", "large", ["a number > 0"]),
        ("rope_max_timescale", float("nan"), ["a number > 0"]),
        ("rope_max_timescale", {"a": 1}, ["a number > 0"]),
        ("rope_type", "linear", ["default, llama3.1 or yarn"]),
        ("rope_type", 3, ["default, llama3.1 or yarn"]),
        ("normalization_layer_epsilon", 0, ["a number > 0"]),
        ("normalize_embedding_logits", "maybe", ["true or false"]),
        ("max_target_length", 0, ["a whole number ≥ 1"]),
        ("max_target_length", 10**400, ["max_target_length"]),
        ("bos_token_id", 64, ["no row of the embedding, which has 64"]),
        ("eos_token_id", -1, ["no row of the embedding"]),
        ("eos_token_id", "</s>", ["eos_token_id"]),
        ("pad_token_id", 1.5, ["pad_token_id"]),
        ("pad_token_id", [0], ["pad_token_id"]),
        ("param_scan_axis", 0, ["param_scan_axis is 0", "layer axis at 1"]),
        ("param_scan_axis", "first", ["param_scan_axis"]),
        ("param_scan_axis", [1], ["param_scan_axis"]),
        ("param_scan_axis", 7, ["param_scan_axis is 7"]),
    ],
)
def test_values_that_make_no_sense(checkpoint, key, value, words):
    ran = convert(checkpoint, told={key: value})
    refused(ran, ConfigError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize("key", ["inhomogeneous_layer_cycle_interval", "global_parameter_scale"])
@pytest.mark.parametrize("value", ["abc", [1], -1, float("inf"), 1.5])
def test_odd_values_of_what_only_helps_to_compare(checkpoint, key, value):
    """They may be refused or ignored, in a sentence."""
    told = {key: value, "base_num_decoder_layers": 4, "base_emb_dim": 16}
    ran = convert(checkpoint, told=told)
    assert "Traceback" not in ran.err
    assert ran.code in (0, ConfigError.exit_code)


def test_untold_fields(checkpoint):
    """Every one is named, and the three ways to tell them."""
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    sentence = refused(ran, ConfigError, out=out_of(checkpoint))
    keys = "decoder_block num_experts_per_tok rope_type rope_max_timescale max_target_length"
    keys += " normalization_layer_epsilon normalize_embedding_logits"
    for key in (*keys.split(), "--config FILE", "--set KEY=VALUE", "moeconv_run.json"):
        assert key in sentence
    ran = moeconv("inspect", checkpoint.run)
    assert ran.code == 0
    assert "no config gives them" in ran.out
    missing = json.loads(moeconv("inspect", checkpoint.run, "--json").out)["missing"]
    assert {"decoder_block", "num_experts_per_tok", "rope_max_timescale"} <= set(missing)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [1", ["is not YAML"]),
        ("\t- x", ["is not YAML"]),
        ("a: b: c", ["is not YAML"]),
        ("- 1\n- 2\n", ["no `key: value` lines"]),
        ("just text", ["no `key: value` lines"]),
        ("run_name: 2020-99-99", ["is not YAML"]),
        ("a: !!python/object:os.system x", ["is not YAML"]),
        (b"\xff\xfe\x00\x01", ["no `key: value` lines"]),  # a letter in UTF-16
        (b"\x80\x81", ["is not YAML"]),
        (b"", ["is empty"]),
        (b"a: \x00", ["is not YAML"]),
        ("base_config: other.yml\n", ["base_config", "other.yml"]),
        ("base_config: [1]\n", ["base_config"]),
        ("base_config: 5\n", ["base_config"]),
        ("model_name: gpt-5\n", ["model_name 'gpt-5'"]),
        ("a: " + "[" * 5000, ["is not YAML"]),
    ],
)
def test_a_config_that_cannot_be_read(checkpoint, content, words):
    path = checkpoint.run.parent / "bad.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", path)
    refused(ran, ConfigError, str(path), *words, out=out_of(checkpoint))


def test_a_config_that_is_not_there(checkpoint):
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", "no-such.yml")
    refused(ran, ConfigError, "cannot read --config no-such.yml", "No such file",
            out=out_of(checkpoint))  # fmt: skip
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", checkpoint.run)
    assert ran.code == CLICK_USAGE
    assert "is a directory" in ran.err


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("rope_max_timescale", ["not of the form key=value"]),
        ("=5", ["not of the form key=value"]),
        ("rope_theta=1e4", ["--set rope_theta", "no such setting"]),
        ("rope_max_timescale=[1", ["not a YAML value"]),
        ("rope_max_timescale=2020-99-99", ["not a YAML value"]),
        ("rope_max_timescale=a: b: c", ["not a YAML value"]),
    ],
)
def test_bad_set(checkpoint, pair, words):
    refused(convert(checkpoint, "--set", pair), ConfigError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--dtype", "int8", ["--dtype int8 is none of keep, float32, bfloat16, float16"]),
        ("--target", "bert", ["--target bert is none of auto, ", "ernie4_5_moe", "llama"]),
        ("--jobs", "0", ["--jobs"]),
        ("--jobs", "-1", ["--jobs"]),
        ("--max-memory", "lots", ["'lots' is not a size"]),
        ("--max-memory", "-1GB", ["is not a size"]),
        ("--max-memory", "0", ["above zero"]),
        ("--max-memory", "9" * 400, ["is not a size"]),
        ("--max-shard-size", "5 XB", ["is not a size such as 5GB, 512MiB"]),
        ("--max-shard-size", "0.1", ["above zero"]),
    ],
)
def test_bad_flags(checkpoint, flag, value, words):
    ran = convert(checkpoint, flag, value)
    refused(ran, UsageError, *words, out=out_of(checkpoint))
    assert UsageError.exit_code == CLICK_USAGE


def test_bad_flags_that_click_refuses(checkpoint):
    for flags in (["--jobs", "two"], ["--jobs"], ["--frob"], ["--quiet=3"], ["extra"]):
        ran = convert(checkpoint, *flags)
        assert ran.code == CLICK_USAGE
        assert "Error: " in ran.err
        assert not out_of(checkpoint).exists()


def test_memory_limit(checkpoint):
    ran = convert(checkpoint, "--max-memory", "1MiB")
    sentence = refused(ran, 9, "--max-memory 1.05 MB is below", out=out_of(checkpoint))
    assert re.search(r"give --max-memory \d+MiB or more", sentence)


def test_yaml_is_what_the_tests_write(checkpoint):
    """The refusals above are the config's doing: as it is, it converts."""
    ran = convert(checkpoint)
    assert ran.code == 0, ran.err
    assert yaml.safe_load((checkpoint.run.parent / "config.yml").read_text()) == checkpoint.config
