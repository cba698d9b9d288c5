"""Configs that are MaxText's, and odd: encodings, bases, references, what Python dumped."""

import importlib.util
import os
from pathlib import Path

import pytest
import synthetic
import yaml
from cli_runner import moeconv
from inputs_lab import log_of, resolved_config, warnings

from moeconv.arch.config_file import load_config_file
from moeconv.arch.config_sources import from_config_file, from_flags
from moeconv.errors import ConfigError
from moeconv.maxtext.checkpoint import open_checkpoint


@pytest.fixture
def made(tmp_path):
    return synthetic.write(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfdecoder_block: mixtral\r\nrope_max_timescale: 500000\r\n",
        b"decoder_block: mixtral\rrope_max_timescale: 500000\r",
        "# Größe\ndecoder_block: mixtral\nrope_max_timescale: 5.0e5\n".encode("utf-16"),
        b"decoder_block: DecoderBlockType.MIXTRAL\nrope_max_timescale: 500_000\n",
        b"decoder_block: 'mixtral'  # a comment\nrope_max_timescale: '5e5'\n",
        b'{"decoder_block": "mixtral",\t"rope_max_timescale": 500000}',
    ],
)
def test_ways_to_write_a_yaml(tmp_path, made, content):
    path = tmp_path / "run.yml"
    path.write_bytes(content)
    told = from_config_file(path)
    assert (told["decoder_block"].value, told["rope_max_timescale"].value) == ("mixtral", 500_000)


def test_a_yaml_that_python_dumped(tmp_path, made):
    """`yaml.dump` of MaxText's settings, which has tuples."""
    config = resolved_config(made, logical_axis_rules=(("a", ("b", "c")),))
    path = tmp_path / "resolved.yml"
    path.write_text(yaml.dump(config))
    assert "!!python/tuple" in path.read_text()
    assert load_config_file(path)["logical_axis_rules"] == [["a", ["b", "c"]]]
    assert open_checkpoint(str(made.run), config=path).resolution.model()


def test_truth_as_a_text(tmp_path, made):
    """pydantic, and so MaxText, reads it."""
    texts = {"logits_via_embedding": "True", "scan_layers": "true", "use_qk_norm": "False"}
    config = made.config_file(tmp_path, **texts)
    assert open_checkpoint(str(made.run), config=config).resolution.model()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("run.yml", "# Größe\n".encode("latin-1"), "it is no text in UTF-8, UTF-16 or UTF-32"),
     ("a.log", b"I1126 07:19 done\nJAX: cpu: x\n", "nor a log with lines `Config param KEY:"),
     ("run.sh", b"python3 -m train base.yml steps=3\n", "a command line is given with --set"),
     ("a.yml", b"steps: 1\nsteps: 2\n", "not YAML of MaxText: the key steps stands there twice")],
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path, made, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    ran = moeconv("inspect", made.run, "--config", path)
    assert ran.code == ConfigError.exit_code and words in ran.error and str(path) in ran.error


@pytest.mark.parametrize("value", ["${oc.env:THETA}", "${rope_factor}"])
def test_a_reference_to_another_value(tmp_path, made, value):
    config = made.config_file(tmp_path, rope_max_timescale=value)
    with pytest.raises(ConfigError, match=r"rope_max_timescale=.*yml:\d+.*write the value itself"):
        open_checkpoint(str(made.run), config=config)
    config = made.config_file(tmp_path, base_output_directory=value)
    assert open_checkpoint(str(made.run), config=config).resolution.model()


def maxtexts_base():
    spec = importlib.util.find_spec("maxtext")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "configs" / "base.yml"


def test_a_base_yml_beside_the_yaml_is_read(tmp_path, made):
    """As MaxText does. Its sizes are those of no run; what is MaxText's own is as if left out."""
    config = made.config_file(tmp_path, base_config="base.yml", num_experts_per_tok=None)
    base = tmp_path / "base.yml"
    text = maxtexts_base().read_text()
    base.write_text(text)
    plain = open_checkpoint(str(made.run), config=config, sets=["num_experts_per_tok=2"])
    assert str(plain.resolution.sources["rms_norm_eps"]).startswith("MaxText default")
    for key, value in {"normalization_layer_epsilon": "1.e-6", "num_experts_per_tok": "2"}.items():
        assert f"\n{key}:" in text
        text = "".join(
            f"{key}: {value}\n" if line.startswith(f"{key}:") else line
            for line in text.splitlines(keepends=True)
        )
    base.write_text(text)
    model = open_checkpoint(str(made.run), config=config).resolution
    assert (model.known["rms_norm_eps"], model.known["num_experts_per_tok"]) == (1e-6, 2)
    assert str(model.sources["rms_norm_eps"]).startswith(f"config file: {base}:")
    base.write_text(f"{text}our_own_attention: fast\n")
    with pytest.raises(ConfigError, match="does not know our_own_attention"):
        open_checkpoint(str(made.run), config=config)


def test_a_long_row_of_base_configs(tmp_path):
    for number in range(700):
        (tmp_path / f"{number}.yml").write_text(f"base_config: {number + 1}.yml\nsteps: 1\n")
    with pytest.raises(ConfigError, match=r"20.yml: its base_config 21.yml is behind 20 others"):
        from_config_file(tmp_path / "0.yml")


@pytest.mark.parametrize("texts", [str, repr])
def test_a_record_whose_values_are_texts(tmp_path, made, texts):
    config = resolved_config(made, mlp_activations=["silu", "linear"])
    record = {key: {"value": texts(value)} for key, value in config.items()}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"wandb_version": 1, **record}))
    assert open_checkpoint(str(made.run), config=path).resolution.model().rope_theta == 500_000


@pytest.mark.parametrize(
    "line",
    [
        "M_ROPE_MAX_TIMESCALE=500000",
        "M_ROPE_MAX_TIMESCALE=5e5 XLA_FLAGS='--a=1 --b=2' python3 -m train base.yml steps=3",
        "JAX_PLATFORMS=cpu python3 -m maxtext.train base.yml rope_max_timescale=500000",
    ],
)
def test_variables_of_the_environment_before_a_command(line):
    assert from_flags([line]).value("rope_max_timescale") == 500_000


@pytest.mark.parametrize("line", ["ROPE_MAX_TIMESCALE=5", "M_ROPE_MAX_TIMESCAL=5", "XLA_FLAGS=a"])
def test_a_variable_that_maxtext_does_not_read(line):
    with pytest.raises(ConfigError, match="--set"):
        from_flags([line])


def test_what_a_run_has_that_cannot_be_read_is_passed_over(made):
    os.mkfifo(made.run / "a.log")
    (made.run / "b.log").mkdir()
    (made.run / "c.log").symlink_to("nowhere")
    (made.run / "d.log.gz").write_bytes(b"\x1f\x8b damaged")
    (made.run / os.fsdecode(b"\xff.log")).write_bytes(b"\xff\0")
    (made.run / "e.yml").write_text("a: [1")
    (made.run / "f.json").write_text("{")
    (made.run / "g.log").write_text(log_of(resolved_config(made)))
    opened = open_checkpoint(str(made.run))
    assert opened.resolution.model() and "g.log" in warnings(opened)[0]


def test_a_terminal_never_gets_what_a_log_has_for_it(tmp_path, made):
    path = tmp_path / "train.log"
    path.write_text(log_of(resolved_config(made, rope_type="\x1b]0;owned\x07\x9b31m")))
    ran = moeconv("inspect", made.run, "--config", path)
    assert ran.code == ConfigError.exit_code and "rope_type=" in ran.error
    assert not {"\x1b", "\x9b", "\x07"} & set(ran.err)
