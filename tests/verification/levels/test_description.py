"""What logits cannot show: the description against the run, and a reference of another model."""

import shutil

import pytest
import synthetic
from parity_lab import check, edit
from safetensors.numpy import load_file, save_file

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CheckFactory, Status
from moeconv.verification.levels import Level
from moeconv.verification.levels.config_parity import check_config_parity
from moeconv.verification.models.reference import reference_config
from moeconv.verification.settings import ParityOptions

# What the conversion was told by a flag over the run's config; the verdict; words of it.
TOLD = {
    "epsilon": (
        "normalization_layer_epsilon=1e-6",
        Status.FAIL,
        "rms_norm_eps is 1e-06 in the output (flag: --set normalization_layer_epsilon=1e-6), but "
        "1e-05 in the run (config file: ",
    ),
    "context": (
        "max_target_length=4096",
        Status.WARN,
        "max_position_embeddings is 4096 in the output (flag: --set max_target_length=4096), but "
        "64 in the run (config file: ",
    ),
    "top-k": ("num_experts_per_tok=1", Status.FAIL, "num_experts_per_tok is 1 in the output"),
    "a default": ("rope_type=llama3.1", Status.WARN, "rope_type is llama3.1 in the output"),
    "nothing new": ("num_experts_per_tok=2", Status.PASS, "fields of the output's description"),
}


def described(out, config=None):
    candidate = Candidate.open(out)
    return check_config_parity(
        CheckFactory(Level.LAYERS),
        candidate,
        reference_config(candidate.model, candidate.layout, candidate.step, config),
    )


@pytest.mark.parametrize("name", TOLD)
def test_what_the_conversion_was_told_is_held_against_the_run(tmp_path, name):
    flag, status, words = TOLD[name]
    made = synthetic.write(tmp_path / "run")
    config = made.config_file(normalization_layer_epsilon=1e-5)
    options = ConvertOptions(config=config, sets=(flag,))
    convert(plan_conversion(str(made.run), options), tmp_path / "out")
    (found,) = described(tmp_path / "out", config)
    assert found.status is status
    assert words in found.summary
    assert len(found.metrics) == (status is not Status.PASS)
    assert described(tmp_path / "out") == [], "nobody else tells of the run"


def test_a_flag_may_fill_what_the_config_leaves_open(tmp_path):
    made = synthetic.write(tmp_path / "run")
    config = made.config_file(rope_max_timescale=None, decoder_block=None)
    flags = ("rope_max_timescale=7e5", "decoder_block=mixtral")
    options = ConvertOptions(config=config, sets=flags)
    convert(plan_conversion(str(made.run), options), tmp_path / "out")
    (found,) = described(tmp_path / "out", config)
    assert found.status is Status.WARN
    assert set(found.metrics) == {"rope_theta", "decoder_block"}
    other = made.config_file(tmp_path, rope_max_timescale=7e5)
    assert described(tmp_path / "out", other)[0].status is Status.PASS


def test_a_description_told_by_another_config_fails(tmp_path):
    """Also where the run leaves a field to MaxText's default: the reference is built of that."""
    made = synthetic.write(tmp_path / "run")
    wrong = made.config_file(tmp_path, normalization_layer_epsilon=1e-6)
    convert(plan_conversion(str(made.run), ConvertOptions(config=wrong)), tmp_path / "out")
    (found,) = described(tmp_path / "out", made.config_file())
    assert found.status is Status.FAIL
    assert "in the run (MaxText default: " in found.summary


def test_a_sidecar_is_held_against_the_output_in_a_level(envy, tmp_path):
    sets = ("normalization_layer_epsilon=1e-6", "max_target_length=128")
    options = ConvertOptions(sets=sets)
    convert(plan_conversion(str(envy / "run"), options), tmp_path / "out")
    found = check("layers", tmp_path / "out")
    assert found["description"].status is Status.FAIL
    assert found["description"].summary.startswith("rms_norm_eps is 1e-06")
    assert "max_position_embeddings" in found["description"].summary


@pytest.mark.parametrize("level", ["logits", "layers"])
def test_a_config_of_another_model_is_no_reference(tmp_path, level):
    made = synthetic.write(tmp_path / "run")
    options = ConvertOptions(config=made.config_file())
    convert(plan_conversion(str(made.run), options), tmp_path / "out")
    config = made.config_file(tmp_path, base_num_decoder_layers=2)
    found = check(level, tmp_path / "out", ParityOptions(config=config))
    assert set(found) == {"description"}
    assert found["description"].status is Status.FAIL
    assert "base_num_decoder_layers=2" in found["description"].summary
    assert "num_hidden_layers is 4" in found["description"].summary


@pytest.fixture(scope="module")
def shorter(envy, tmp_path_factory):
    """The same model without its last two layers."""
    out = tmp_path_factory.mktemp("shorter") / "out"
    out.mkdir()
    kept = {
        name: value
        for name, value in load_file(envy / "fp32" / "model.safetensors").items()
        if not name.startswith(("model.layers.2.", "model.layers.3."))
    }
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    shutil.copy(envy / "fp32" / "config.json", out)
    edit(num_hidden_layers=2)(out)
    return out


def test_a_reference_of_fewer_layers_is_another_model(envy, shorter):
    found = check("layers", envy / "fp32", ParityOptions(against=shorter))
    assert set(found) == {"reference", "depth"}
    assert found["depth"].status is Status.FAIL
    assert "has 4 layers" in found["depth"].summary and "has 2" in found["depth"].summary


def test_a_reference_of_more_layers_is_another_model(envy, shorter, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    for path in shorter.iterdir():
        shutil.copy(path, out)
    found = check("layers", out, ParityOptions(against=envy / "fp32"))
    assert found["depth"].status is Status.FAIL
    assert "has 2 layers" in found["depth"].summary and "has 4" in found["depth"].summary
