"""A config has one meaning, for convert, for verify's reference, and for MaxText itself."""

import importlib.util
import json
from pathlib import Path

import pytest
import synthetic
import yaml
from cli_runner import moeconv

from moeconv.arch.defaults import CHANGED, known_keys, maxtext_defaults
from moeconv.arch.keys import keys
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import ConfigError
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.orbax.locate import locate
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CheckFactory, Status
from moeconv.verification.levels import Level
from moeconv.verification.levels.config_parity import check_config_parity
from moeconv.verification.models.reference import reference_config

# What a user writes over the sample's YAML (None: left out), and what MaxText makes of it.
READINGS = {
    "the model's file wins": (
        {"model_name": "mixtral-8x7b", "rope_max_timescale": 500_000},
        {"rope_max_timescale": 1_000_000, "num_experts_per_tok": 2},
    ),
    "also where overriding is asked for, which MaxText does for its command line": (
        {"model_name": "mixtral-8x7b", "rope_max_timescale": 5, "override_model_config": True},
        {"rope_max_timescale": 1_000_000},
    ),
    "what the model's file leaves open": (
        {"model_name": "mixtral-8x7b", "max_target_length": 77},
        {"max_target_length": 77},
    ),
    "no model": ({"rope_max_timescale": "7e5"}, {"rope_max_timescale": 700_000}),
    "left out": ({"rope_max_timescale": None}, {"rope_max_timescale": 10_000}),
    "a scale": (
        {"global_parameter_scale": 8, "base_emb_dim": 8, "base_num_decoder_layers": 2},
        {"global_parameter_scale": 1, "base_emb_dim": 16, "base_num_decoder_layers": 4},
    ),
    "a scale of base sizes that shapes tell": (
        {"global_parameter_scale": 8},
        {"global_parameter_scale": 1, "base_emb_dim": 16},
    ),
    "a resolved config, of base and derived sizes": (
        {"global_parameter_scale": 8, "base_emb_dim": 8, "emb_dim": 16, "base_mlp_dim": 12,
         "mlp_dim": 24, "model_name": "mixtral-8x7b", "rope_max_timescale": 5},
        {"base_emb_dim": 16, "rope_max_timescale": 5},
    ),
}  # fmt: skip
# Description field -> MaxText key, of what both sides must agree on.
FIELDS = {
    "rope_theta": "rope_max_timescale",
    "rms_norm_eps": "normalization_layer_epsilon",
    "num_experts_per_tok": "num_experts_per_tok",
    "max_position_embeddings": "max_target_length",
    "decoder_block": "decoder_block",
    "hidden_size": "base_emb_dim",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("made") / "run")


def reference_of(made, config):
    """What verify's reference is built from, where the manifest says something else altogether."""
    checkpoint = open_checkpoint(str(made.run), config=made.config_file())
    return reference_config(
        checkpoint.resolution.model(), checkpoint.layout, checkpoint.step, config
    )


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("sidecar", [False, True])
def test_convert_and_verify_read_alike(made, tmp_path, name, sidecar):
    changes, wanted = READINGS[name]
    config = made.config_file(tmp_path, **changes)
    if sidecar:
        content = yaml.safe_load(config.read_text())
        config = None
        lines = {"format": "moeconv-run", "version": 1, "config": content}
        (made.run / "moeconv_run.json").write_text(json.dumps(lines))
    try:
        model = open_checkpoint(str(made.run), config=config).resolution.model()
        reference = reference_of(made, config)
    finally:
        (made.run / "moeconv_run.json").unlink(missing_ok=True)
    assert reference.independent
    for key, value in wanted.items():
        assert reference.keys[key] == value, key
    for field, key in FIELDS.items():
        assert getattr(model, field) == reference.keys[key], field
    assert not {"emb_dim", "mlp_dim"} & reference.keys.keys()


def test_a_right_conversion_is_described_right(made, tmp_path):
    config = made.config_file(tmp_path, model_name="mixtral-8x7b", rope_max_timescale=500_000)
    convert(plan_conversion(str(made.run), ConvertOptions(config=config)), tmp_path / "out")
    candidate = Candidate.open(tmp_path / "out")
    reference = reference_config(candidate.model, candidate.layout, candidate.step, config)
    (found,) = check_config_parity(CheckFactory(Level.LAYERS), candidate, reference)
    assert found.status is Status.PASS


def test_what_the_extract_of_a_models_file_lacks_decides_nothing():
    """Else the reference, where a key given wins over the file, would read it otherwise."""
    spec = importlib.util.find_spec("maxtext")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "configs" / "models"
    for name, packaged in maxtext_defaults()["models"].items():
        content = yaml.safe_load((folder / f"{name}.yml").read_text())
        kinds = {key: keys()[key].kind for key in content}
        deciding = {key for key in content if kinds[key] in ("function", "size")}
        assert deciding - packaged.keys() <= {k for k in deciding if kinds[k] == "size"}, name


@pytest.mark.maxtext
@pytest.mark.parametrize("name", [n for n in READINGS if "resolved" not in n and "shapes" not in n])
def test_maxtext_reads_alike(made, tmp_path, name):
    """MaxText on the user's file, as in training, and on what verify gives it."""
    from maxtext.configs import pyconfig

    from moeconv.verification.models.maxtext_config import build_config, flags_kept, quiet

    changes, _ = READINGS[name]
    config = made.config_file(tmp_path, **changes)
    for line in ("base_config: base.yml", f"base_output_directory: {tmp_path}", "run_name: x",
                 "hardware: cpu", "skip_jax_distributed_system: true", "dataset_type: synthetic",
                 "enable_checkpointing: false", "log_config: false"):  # fmt: skip
        config.write_text(f"{config.read_text()}{line}\n")
    with quiet(), flags_kept():
        trained = pyconfig.initialize(["", str(config)])
    with quiet():
        ours = build_config(
            reference_of(made, made.config_file(tmp_path, **changes)).keys, "float32"
        )
    for key in set(FIELDS.values()) - {"base_emb_dim"}:
        assert getattr(trained, key) == getattr(ours, key), key


def test_a_flag_names_the_model(made):
    ran = moeconv("inspect", made.run, "--set", "model_name=mixtral-8x7b", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["fields"]["rope_theta"] == {
        "value": 1_000_000.0,
        "source": "MaxText model: configs/models/mixtral-8x7b.yml",
    }
    # As on MaxText's command line, base.yml says what that file does not.
    assert found["missing"] == []
    assert found["fields"]["rope_type"]["source"].startswith("MaxText default: base.yml")


@pytest.mark.parametrize("sets", [["rope_max_timescale=5"], []])
def test_a_flag_replaces_the_files_model(made, tmp_path, sets):
    config = made.config_file(tmp_path, model_name="mixtral-8x22b", rope_max_timescale=7)
    flags = ["model_name=mixtral-8x7b", *sets]
    model = open_checkpoint(str(made.run), config=config, sets=flags).resolution.model()
    assert model.rope_theta == (5 if sets else 1_000_000)


def test_a_flag_names_no_model(made):
    ran = moeconv("inspect", made.run, "--set", "model_name=mixtral-9x9b")
    assert ran.code == ConfigError.exit_code
    assert ran.error.startswith("--set: model_name 'mixtral-9x9b' is none of MaxText's models")


@pytest.mark.parametrize(
    "pair",
    ["base_emb_dim=256", "emb_dim=256", "base_num_query_heads=8", "base_num_decoder_layers=99",
     "base_mlp_dim=7", "global_parameter_scale=8"],
)  # fmt: skip
def test_a_flag_that_contradicts_the_shapes(made, tmp_path, pair):
    """Also where the run's resolved config has the derived size, which agrees."""
    content = {**made.config, "base_emb_dim": 16, "emb_dim": 16, "num_query_heads": 4,
               "num_decoder_layers": 4, "moe_mlp_dim": 24}  # fmt: skip
    config = tmp_path / "resolved.yml"
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="contradicts the checkpoint"):
        open_checkpoint(str(made.run), config=config, sets=[pair])


def test_a_width_that_is_not_set_contradicts_nothing(made, tmp_path):
    content = {**made.config, "base_moe_mlp_dim": -1, "moe_mlp_dim": -2}
    config = tmp_path / "resolved.yml"
    config.write_text(yaml.safe_dump(content))
    assert open_checkpoint(str(made.run), config=config).resolution.model()


@pytest.fixture
def undated(tmp_path):
    """A save without the metadata that Orbax writes since May 2024."""
    made = synthetic.write(tmp_path / "old")
    (made.step_dir / "_CHECKPOINT_METADATA").unlink()
    assert not locate(str(made.run)).dated
    return made


def test_a_default_that_changed_is_asked_for(undated, tmp_path):
    out, config = tmp_path / "out", undated.config_file()
    ran = moeconv("convert", undated.run, out, "--config", config)
    assert ran.code == ConfigError.exit_code
    assert "normalization_layer_epsilon  (MaxText's default: 1e-05, but 1e-06 until" in ran.error
    assert not out.exists()
    flag = ("--set", "normalization_layer_epsilon=1e-6")
    assert moeconv("convert", undated.run, out, "--config", config, *flag).code == 0
    candidate = Candidate.open(out)
    reference = reference_config(candidate.model, candidate.layout, candidate.step, config)
    assert reference.keys["normalization_layer_epsilon"] == 1e-6
    (found,) = check_config_parity(CheckFactory(Level.LAYERS), candidate, reference)
    assert found.status is Status.WARN
    assert set(found.metrics) == {"rms_norm_eps"}


@pytest.mark.parametrize(
    "told", [{"normalization_layer_epsilon": 1e-5}, {"model_name": "mixtral-8x7b"}]
)
def test_who_says_it_is_not_asked(undated, told):
    assert open_checkpoint(str(undated.run), config=undated.config_file(**told)).resolution.model()


def test_a_dated_save_has_the_default(made):
    model = open_checkpoint(str(made.run), config=made.config_file()).resolution.model()
    assert model.rms_norm_eps == maxtext_defaults()["base"]["normalization_layer_epsilon"]
    assert CHANGED.keys() <= known_keys()
