"""The default recipe's real train step, compiled for two T4s, fits them."""

from pathlib import Path

import pytest
from moeconv_train.preflight import T4X2, preflight
from moeconv_train.preflight.config import read_recipe
from moeconv_train.preflight.memory import (
    STOCK,
    PluginMissingError,
    Variant,
    ladder,
    measure,
    plugin_environment,
    state_size,
)

from moeconv.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
RECIPE = read_recipe(CONFIGS / "llama3_moe_200m_tinystories.yml")
ALL_MOE = read_recipe(CONFIGS / "llama3_moe_200m_tinystories_all_moe.yml")
KNOWN = {"tokenizer_size": 128_256, "pad_id": -1, "wandb": False}
# What the recipe promises, whatever fraction of a GPU JAX is told to take.
PROMISED = 14.6 * 2**30


@pytest.fixture
def plugin() -> None:
    try:
        plugin_environment()
    except PluginMissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("recipe", [RECIPE, ALL_MOE], ids=["default", "all MoE"])
def test_a_recipe_fits_two_t4s_as_it_is(plugin, tmp_path, recipe):
    keys = {**recipe, "base_output_directory": str(tmp_path)}
    report = preflight(keys, KNOWN, target=T4X2, online=False)
    assert report.of("config").status == "ok"
    assert report.of("memory").status == "ok", report.of("memory").message
    (row,) = report.memory.rows
    assert row.total < PROMISED and row.fits and not row.xla_rematerialised
    # Weights and both of Adam's moments in fp32, and little else.
    assert row.arguments == pytest.approx(12 * report.memory.parameters, rel=1e-3)
    # Every output but the metrics takes the place of an argument.
    assert row.outputs - row.aliased < 10_000
    assert row.matmul_flops_by_type["f16"] > 0.9 * row.matmul_flops
    assert not row.uncounted


def test_loss_scaling_and_the_fp16_head_cost_nothing(plugin):
    variants = [Variant("as given")]
    ours = measure(RECIPE, T4X2, variants=variants).rows[0]
    stock = measure(RECIPE, T4X2, variants=variants, patch=STOCK).rows[0]
    assert ours.total < 1.005 * stock.total
    assert ours.matmul_flops == stock.matmul_flops


def test_a_run_that_does_not_fit_is_told_what_would(plugin, tmp_path):
    keys = {**RECIPE, "base_output_directory": str(tmp_path), "per_device_batch_size": 8}
    report = preflight(keys, KNOWN, target=T4X2, online=False)
    finding = report.of("memory")
    assert finding.status == "refused"
    first, *rungs = report.memory.rows
    assert not first.fits and rungs[-1].fits and not any(row.fits for row in rungs[:-1])
    assert rungs[-1].name in finding.message
    # Compiled one after the other in the ladder's order, as far as needed.
    names = [rung.name for rung in ladder(keys)]
    assert [row.name for row in rungs] == names[: len(rungs)]


def test_the_states_size_needs_no_plugin():
    report = state_size(RECIPE, 2)
    assert report.parameters == 303_787_776
    assert report.state_bytes == pytest.approx(12 * 303_787_776, rel=1e-3)
    assert not report.rows


def test_what_maxtext_refuses_is_one_sentence():
    with pytest.raises(ConfigError, match="decoder_block") as error:
        state_size({**RECIPE, "decoder_block": "nonsense"}, 2)
    assert "\n" not in str(error.value)
