"""The default recipe's real train step, compiled for two T4s, fits them."""

import os
from pathlib import Path

import pytest
from moeconv_train.preflight import T4X2, hlo, preflight
from moeconv_train.preflight.memory import (
    STOCK,
    Patch,
    PluginMissingError,
    Variant,
    ladder,
    measure,
    plugin_environment,
    state_size,
)
from moeconv_train.recipe import read_config

from moeconv.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
RECIPE = read_config(CONFIGS / "llama3_moe_200m_tinystories.yml")
ALL_MOE = read_config(CONFIGS / "llama3_moe_200m_tinystories_all_moe.yml")
KNOWN = {"tokenizer_size": 128_256, "pad_id": -1, "wandb": False}
# What the recipe promises, whatever fraction of a GPU JAX is told to take.
PROMISED = 14.6 * 2**30


@pytest.fixture(scope="module")
def plugin() -> None:
    """What `make test-slow` brings; CI must not pass without it."""
    try:
        plugin_environment()
    except PluginMissingError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; or run `make test-slow`")


@pytest.fixture(scope="module")
def compiled(plugin, tmp_path_factory):
    """The default recipe's step as the trainer changes it: its numbers, and its optimised HLO."""
    text = tmp_path_factory.mktemp("hlo") / "step.hlo"
    report = measure(RECIPE, T4X2, variants=[Variant("as given")], hlo=text)
    return report.rows[0], text.read_text(encoding="utf-8")


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


def test_loss_scaling_and_the_fp16_head_cost_nothing(compiled):
    ours, _ = compiled
    stock = measure(RECIPE, T4X2, variants=[Variant("as given")], patch=STOCK).rows[0]
    assert ours.total < 1.005 * stock.total
    assert ours.matmul_flops == stock.matmul_flops


def test_the_heads_matmuls_are_fp16_with_fp32_sums_on_a_t4(compiled):
    """The three with the vocabulary's axis, in what XLA gives to cuBLAS: the step's largest."""
    _, text = compiled
    found = hlo.matmuls(text)
    head = [each for each in found if "128256" in f"{each.operands} {each.result}"]
    assert sorted(each.result for each in head) == [
        "f16[8192,128256]", "f32[128256,768]", "f32[8192,768]"
    ]  # fmt: skip
    for each in head:
        assert [operand[:4] for operand in each.operands] == ["f16[", "f16["]
        assert each.algorithm == "ALG_DOT_F16_F16_F32"
        assert each.flops == 2 * 8192 * 768 * 128_256 == max(other.flops for other in found)
    # Nothing that is multiplied is bfloat16, which a T4 would do in fp32.
    assert not [each for each in found if "bf16" in f"{each.operands}"]


def test_tiles_and_blocks_make_the_step_cheaper(compiled):
    """docs/performance.md has the figures; these are the claims."""
    stock, _ = compiled
    patch = Patch(arguments={"expert_tiles": True, "attention_blocks": True})
    (row,) = measure(RECIPE, T4X2, variants=[Variant("as given")], patch=patch).rows
    assert row.matmul_flops < 0.65 * stock.matmul_flops
    assert row.matmul_flops_by_type["f32"] < 0.01 * stock.matmul_flops_by_type["f32"]
    assert row.traffic < 0.65 * stock.traffic
    assert row.total < 0.9 * stock.total
    assert not row.uncounted


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
