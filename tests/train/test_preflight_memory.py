"""The default recipe's real train step, compiled for two T4s, fits them."""

import dataclasses
import os
from pathlib import Path

import _hlo
import pytest
from moeconv_train.model_size import model_size
from moeconv_train.preflight import T4X2, preflight
from moeconv_train.preflight.config import resolve
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

pytestmark = [
    pytest.mark.proof("memory on two T4s", inputs=["requirements/cuda-plugin.txt"]),
    pytest.mark.timeout(1800),
]

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
RECIPE = read_config(CONFIGS / "llama3_moe_200m_tinystories.yml")
ALL_MOE = read_config(CONFIGS / "llama3_moe_200m_tinystories_all_moe.yml")
KNOWN = {"tokenizer_size": 128_256, "pad_id": -1, "wandb": False}
# What the recipe promises, whatever fraction of a GPU JAX is told to take.
PROMISED = 14.6 * 2**30
SMALL = {
    "base_num_decoder_layers": 2,
    "base_emb_dim": 256,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "base_mlp_dim": 512,
    "base_moe_mlp_dim": 512,
    "vocab_size": 2048,
    "max_target_length": 512,
    "per_device_batch_size": 8,
    "num_vocab_tiling": 4,
}
# JAX takes 0.36 GB of it: the step needs 0.39 GB, and with full rematerialisation 0.34 GB.
SMALL_MEMORY = 391_000_000


@pytest.fixture(scope="module", autouse=True)
def without_torch():
    """As where it is trained; and a third of the time that MaxText takes to be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CONFIGS.parents[1] / "tests" / "without_torch"))
        yield


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
    """All that is compiled for the recipes, by one process: XLA's numbers, and the HLO text."""
    texts = tmp_path_factory.mktemp("hlo")
    cheaper = Patch(arguments={"expert_tiles": True, "attention_blocks": True})
    variants = [
        Variant("stock", patch=STOCK),
        Variant("cheaper", patch=cheaper),
        Variant("all MoE", ALL_MOE),
        Variant("default"),
    ]
    report = measure(RECIPE, T4X2, variants=variants, until_fit=False, hlo=texts)
    assert not report.failed
    return {row.name: (row, (texts / f"{row.name}.hlo").read_text()) for row in report.rows}


@pytest.mark.parametrize(("name", "recipe"), [("default", RECIPE), ("all MoE", ALL_MOE)])
def test_a_recipe_fits_two_t4s_as_it_is(compiled, tmp_path, name, recipe):
    keys = {**recipe, "base_output_directory": str(tmp_path)}
    (row, text), parameters = compiled[name], model_size(resolve(recipe)).total
    known = {**KNOWN, "state_bytes": 12 * parameters}
    report = preflight(keys, known, target=T4X2, memory=False, online=False)
    assert report.of("config").status == "ok"
    assert row.total < PROMISED and row.fits and not row.xla_rematerialised
    # Weights and both of Adam's moments in fp32, and little else.
    assert row.arguments == pytest.approx(12 * parameters, rel=1e-3)
    # Every output but the metrics takes the place of an argument.
    assert row.outputs - row.aliased < 10_000
    counts = _hlo.count(text)
    assert counts.flops["f16"] > 0.9 * counts.flops.total() and not counts.unknown


def test_loss_scaling_and_the_fp16_head_cost_nothing(compiled):
    (ours, text), (stock, theirs) = compiled["default"], compiled["stock"]
    assert ours.total < 1.005 * stock.total
    assert _hlo.count(text).flops.total() == _hlo.count(theirs).flops.total()


def test_the_heads_matmuls_are_fp16_with_fp32_sums_on_a_t4(compiled):
    """The three with the vocabulary's axis, in what XLA gives to cuBLAS: the step's largest."""
    found = _hlo.matmuls(compiled["default"][1])
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
    (ours, text), (row, cheaper) = compiled["default"], compiled["cheaper"]
    then, now = _hlo.count(text), _hlo.count(cheaper)
    assert now.flops.total() < 0.65 * then.flops.total()
    assert now.flops["f32"] < 0.01 * then.flops["f32"]
    assert now.traffic < 0.65 * then.traffic
    assert row.total < 0.9 * ours.total
    assert not now.unknown


def test_a_run_that_does_not_fit_is_told_what_would(plugin, tmp_path):
    """The recipe made small, on a GPU too small for it."""
    keys = {**RECIPE, **SMALL, "base_output_directory": str(tmp_path)}
    known = {**KNOWN, "tokenizer_size": SMALL["vocab_size"]}
    target = dataclasses.replace(T4X2, memory=SMALL_MEMORY)
    report = preflight(keys, known, target=target, online=False)
    finding = report.of("memory")
    assert finding.status == "refused"
    first, *rungs = report.memory.rows
    assert not first.fits and rungs[-1].fits and not any(row.fits for row in rungs[:-1])
    assert rungs[-1].name in finding.message
    # Compiled one after the other in the ladder's order, as far as needed.
    names = [rung.name for rung in ladder(keys)]
    assert [row.name for row in rungs] == names[: len(rungs)] and len(rungs) > 1


def test_the_states_size_needs_no_plugin():
    report = state_size(RECIPE, 2)
    assert report.parameters == 303_787_776
    assert report.state_bytes == pytest.approx(12 * 303_787_776, rel=1e-3)
    assert not report.rows


def test_what_maxtext_refuses_is_one_sentence():
    with pytest.raises(ConfigError, match="decoder_block") as error:
        state_size({**RECIPE, "decoder_block": "nonsense"}, 2)
    assert "\n" not in str(error.value)
