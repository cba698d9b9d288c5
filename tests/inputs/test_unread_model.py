"""MaxText 0.2.0 and 0.2.1 passed a model's file over where the YAML was outside their configs/.

Their configs/pyconfig.py looks for `models/NAME.yml` beside the YAML, beside its folder, and in
`configs/configs/`, which there is not; it warns, and trains without.
"""

import json

import pytest
import synthetic
from cli_runner import moeconv

from moeconv.errors import ConfigError
from moeconv.maxtext.checkpoint import open_checkpoint

SIZES = {"base_emb_dim": 16, "base_num_query_heads": 4, "base_num_kv_heads": 2, "head_dim": 4,
         "base_mlp_dim": 24, "base_moe_mlp_dim": 24, "base_num_decoder_layers": 4,
         "num_experts": 4, "vocab_size": 64, "logits_via_embedding": True}  # fmt: skip
MODEL = {"model_name": "mixtral-8x7b", "normalization_layer_epsilon": 1e-6}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """With the metadata that releases before 0.2.4 left."""
    made = synthetic.write(tmp_path_factory.mktemp("made") / "run")
    path = made.step_dir / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    handlers = {"items": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.Handler"}
    path.write_text(json.dumps({**content, "item_handlers": handlers, "custom_metadata": {}}))
    return made


def test_what_the_file_gives_is_asked_for(old, tmp_path):
    config = old.config_file(tmp_path, **MODEL, **SIZES)
    ran = moeconv("convert", old.run, tmp_path / "out", "--config", config)
    assert ran.code == ConfigError.exit_code
    assert "MaxText 0.2.0 and 0.2.1 did not read a model's file" in ran.error
    lines = [line.strip() for line in ran.error.splitlines() if line.startswith("  ")]
    theta, epsilon = sorted(lines, reverse=True)
    number = config.read_text().splitlines().index("rope_max_timescale: 500000") + 1
    model = "configs/models/mixtral-8x7b.yml"
    assert theta == (
        f"rope_max_timescale: 1000000 by {model}, 500000 without it ({config}:{number})"
    )
    assert epsilon.startswith(f"normalization_layer_epsilon: 1e-05 by {model}, 1e-06 without it")
    assert not (tmp_path / "out").exists()
    assert "did not read a model's file" in moeconv("inspect", old.run, "--config", config).out


def test_both_answers_are_taken(old, tmp_path):
    config = old.config_file(tmp_path, **MODEL, **SIZES)
    sets = ["rope_max_timescale=1e6", "normalization_layer_epsilon=1e-5"]
    model = open_checkpoint(str(old.run), config=config, sets=sets).resolution.model()
    assert (model.rope_theta, model.rms_norm_eps) == (1_000_000, 1e-5)
    config = old.config_file(tmp_path, **{**MODEL, "model_name": None}, **SIZES)
    model = open_checkpoint(str(old.run), config=config).resolution.model()
    assert (model.rope_theta, model.rms_norm_eps) == (500_000, 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {**MODEL, "rope_max_timescale": 1_000_000, "normalization_layer_epsilon": 1e-5, **SIZES},
        MODEL,
        {**MODEL, **SIZES, "base_mlp_dim": 48, "base_moe_mlp_dim": 48},
        {**MODEL, **SIZES, "num_experts": 8},
        {**MODEL, **SIZES, "decoder_block": "llama2"},
    ],
    ids=["the same either way", "no sizes", "another width", "more experts", "another block"],
)
def test_nothing_is_asked_where_only_one_reading_fits(old, tmp_path, changes):
    config = old.config_file(tmp_path, **changes)
    model = open_checkpoint(str(old.run), config=config).resolution.model()
    assert (model.rope_theta, model.rms_norm_eps) == (1_000_000, 1e-5)


def test_nor_of_a_later_release(tmp_path):
    made = synthetic.write(tmp_path / "run")
    config = made.config_file(tmp_path, **MODEL, **SIZES)
    assert open_checkpoint(str(made.run), config=config).resolution.model().rope_theta == 1e6
