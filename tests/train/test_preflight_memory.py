"""The recipes' real train and evaluation steps, compiled for two T4s, fit them."""

import os
from pathlib import Path

import _hlo
import pytest
from moeconv_train.model_size import model_size
from moeconv_train.preflight.config import resolve
from moeconv_train.preflight.memory import Variant, measure, plugin_environment
from moeconv_train.preflight.target import T4X2
from moeconv_train.recipe import DEFAULT, read

from moeconv.errors import MissingPackageError

pytestmark = [
    pytest.mark.proof("memory on two T4s", inputs=["requirements/cuda-plugin.txt"]),
    pytest.mark.timeout(1800),
]

WITHOUT_TORCH = Path(__file__).parents[1] / "without_torch"
ALL_MOE = f"{DEFAULT}_all_moe"
TRAIN_ONLY = {"eval_interval": -1}
SMALL = {
    **TRAIN_ONLY,
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


@pytest.fixture(scope="module", autouse=True)
def without_torch():
    """As where it is trained; and a third of the time that MaxText takes to be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(WITHOUT_TORCH), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def plugin() -> None:
    """What `make test-slow` brings; CI must not pass without it."""
    try:
        plugin_environment()
    except MissingPackageError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; or run `make test-slow`")


@pytest.fixture(scope="module")
def compiled(plugin, tmp_path_factory):
    """All that is compiled for the recipes, by one process: XLA's numbers, and the HLO text."""
    texts = tmp_path_factory.mktemp("hlo")
    default, all_moe = read([]), read([ALL_MOE])
    variants = [
        Variant(DEFAULT, {}, dict(default.run.patches)),
        Variant(ALL_MOE, {**all_moe.keys, **TRAIN_ONLY}, dict(all_moe.run.patches)),
        Variant("small", SMALL),
        Variant("small and stock", SMALL, None),
        Variant("wrong", {"decoder_block": "nonsense"}),
    ]
    rows, failed = measure(default.keys, T4X2, variants, hlo=texts)
    return {row.name: (row, (texts / f"{row.name}.hlo").read_text()) for row in rows}, failed


@pytest.mark.parametrize("name", [DEFAULT, ALL_MOE])
def test_a_recipe_fits_two_t4s_as_it_is(compiled, name):
    (row, text), parameters = compiled[0][name], model_size(resolve(read([name]).keys)).total
    assert row.fits and not row.xla_rematerialised
    # Weights and both of Adam's moments in fp32, and little else.
    assert row.arguments == pytest.approx(12 * parameters, rel=1e-3)
    # Every output but the metrics takes the place of an argument.
    assert row.outputs - row.aliased < 10_000
    if name == DEFAULT:  # an evaluation keeps nothing for a backward pass
        assert 0 < row.evaluation < row.temporaries
    counts = _hlo.count(text)
    assert counts.flops["f16"] > 0.9 * counts.flops.total() and not counts.unknown


def test_loss_scaling_and_the_fp16_head_cost_nothing(compiled):
    (ours, text), (stock, theirs) = compiled[0]["small"], compiled[0]["small and stock"]
    assert ours.total < 1.005 * stock.total and ours.evaluation == 0
    assert _hlo.count(text).flops.total() == _hlo.count(theirs).flops.total()


def test_the_heads_matmuls_are_fp16_with_fp32_sums_on_a_t4(compiled):
    """The three with the vocabulary's axis, in what XLA gives to cuBLAS: the step's largest."""
    found = _hlo.matmuls(compiled[0][DEFAULT][1])
    head = [each for each in found if "128256" in f"{each.operands} {each.result}"]
    assert sorted(each.result for each in head) == [
        "f16[128256,768]", "f16[8192,128256]", "f16[8192,768]"
    ]  # fmt: skip
    for each in head:
        assert [operand[:4] for operand in each.operands] == ["f16[", "f16["]
        assert each.algorithm == "ALG_DOT_F16_F16_F32"
        assert each.flops == 2 * 8192 * 768 * 128_256 == max(other.flops for other in found)
    # Nothing that is multiplied is bfloat16, which a T4 would do in fp32.
    assert not [each for each in found if "bf16" in f"{each.operands}"]


def test_the_default_step_is_as_cheap_as_the_docs_say(compiled):
    """docs/performance.md; the gradients cross in fp16, each once, while the GPU computes."""
    row, text = compiled[0][DEFAULT]
    counts, sums = _hlo.count(text), _hlo.all_reduces(text)
    assert counts.flops["f16"] < 9.9e12 and counts.flops["f32"] < 0.01e12
    assert counts.traffic < 99e9 and row.total < 9.5 * 2**30
    assert 2 * 303_787_776 <= sum(each.bytes.total() for each in sums) < 610e6
    # Nothing waits but four scalars.
    assert sum(each.bytes.total() for each in sums if not each.behind) <= 16


def test_what_maxtext_refuses_is_one_sentence_that_names_the_field(compiled):
    (told,) = compiled[1].values()
    assert told.startswith("decoder_block: ") and "\n" not in told
