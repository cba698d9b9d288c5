"""What a description read from a file may hold, field by field."""

import json

import pytest
import synthetic
from pydantic import ValidationError

from moeconv.artifact.manifest import Manifest
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.verification.candidate import Candidate


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Of a model whose shapes leave the scan axis open: as many layers as it is wide."""
    folder = tmp_path_factory.mktemp("made")
    made = synthetic.write(folder / "run", sizes={"L": 16})
    options = ConvertOptions(config=made.config_file(), sets=("param_scan_axis=1",))
    convert(plan_conversion(str(made.run), options), folder / "out")
    return folder / "out"


def changed(out, name, value):
    content = json.loads((out / "moeconv_manifest.json").read_bytes())
    content["model"][name]["value"] = value
    return Manifest.model_validate(content).description()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "16", None])
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "max_position_embeddings"])
def test_a_size_is_a_count(out, name, value):
    with pytest.raises(ValidationError, match=name):
        changed(out, name, value)


@pytest.mark.parametrize("value", [0, -1e-5, "1", True])
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_a_number_is_positive(out, name, value):
    with pytest.raises(ValidationError, match=name):
        changed(out, name, value)


@pytest.mark.parametrize("value", [0, 7, None])
def test_a_token_may_be_the_first(out, value):
    assert changed(out, "bos_token_id", value).bos_token_id == value


def test_no_token_is_below(out):
    with pytest.raises(ValidationError, match="pad_token_id"):
        changed(out, "pad_token_id", -1)


def test_the_layout_is_the_one_described(out):
    assert Candidate.open(out).layout.scan_axis == 1
