"""The parts of levels logits and layers: ties, roundings, layers, rows, limits."""

import numpy as np
import pytest

from moeconv.tensor.values import Affine, Fold
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, Status
from moeconv.verification.measure.limits import HIDDEN, KL, LIMITS
from moeconv.verification.measure.rounding import Rounding, roundings
from moeconv.verification.measure.routing import Choice, compare_routing
from moeconv.verification.measure.tokens import RANDOM, TEXT, Sample, make_rows
from moeconv.verification.models.source_layers import LayerReader


def test_a_near_tie_is_told_from_a_mistake():
    rng = np.random.default_rng(0)
    right = rng.standard_normal((1, 50, 4))
    right[0, 20] = [3.0, 1.0, 1.0 - 1e-7, -1.0]
    noisy = right + 1e-6 * rng.standard_normal(right.shape)
    noisy[0, 20] = [3.0, 1.0, 1.0 + 1e-7, -1.0]
    found = compare_routing({0: right}, {0: noisy}, choice=Choice(2), shape=(1, 50))
    assert (found.layers[0].status, found.layers[0].flips) == (Status.PASS, 1)
    assert found.settled[0, :20].all() and not found.settled[0, 20:].any()
    wrong = noisy.copy()
    wrong[0, 10] = wrong[0, 10, ::-1]
    found = compare_routing({0: right}, {0: wrong}, choice=Choice(2), shape=(1, 50))
    assert found.layers[0].status is Status.FAIL and found.settled.all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moved_weights_stay_within_the_rounding(dtype):
    import ml_dtypes

    numpy_type = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    values[:10] = 0
    moved = Rounding(Affine(Fold(8.0, "8"), "float32", dtype)).move(values)
    rounded = values.astype(numpy_type).astype(np.float32)
    assert (moved[:10] == 0).all()
    apart, true = (np.sqrt(np.mean((v - values) ** 2)) for v in (moved, rounded))
    assert 0.9 < apart / true < 1.1
    assert np.array_equal(moved, Rounding(Affine(Fold(8.0, "8"), "float32", dtype)).move(values)), (
        "copies are moved alike"
    )


def test_exact_edges_are_not_moved(envy):
    assert roundings(Candidate.open(envy / "fp32").edges.values()) == {}
    names = roundings(Candidate.open(envy / "bf16").edges.values())
    assert set(names) == set(Candidate.open(envy / "bf16").arrays.info)


def test_layers_are_laid_out_once_and_cleaned_up(envy, tmp_path):
    candidate = Candidate.open(envy / "fp32")
    name = ("MoeBlock_0.wi_0", 3)
    stored = candidate.layout.places[name]
    info = candidate.arrays.info[stored.name]
    whole = candidate.arrays.reader(info.name, 1 << 20).read(tuple(slice(0, n) for n in info.shape))
    with LayerReader(candidate.arrays, candidate.layout, scratch=tmp_path) as read:
        assert read.scratch_bytes > 0
        assert np.array_equal(
            read(*name), np.take(whole, stored.entry(3)["L"], stored.axes.index("L"))
        )
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_rows_are_packed_text_and_random_ids(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sample = Sample(("a b", "c"), "here")
    rows = make_rows(tmp_path, sample, count=20, vocab_size=9, context=16, eos=1)
    assert rows.tokens.shape == (4, 16)
    assert rows.kinds == (TEXT, TEXT, RANDOM, RANDOM)
    assert rows.tokens[0, :8].tolist() == [0, 2, 3, 1, 0, 4, 1, 0]
    assert rows.targets[0, :3].tolist() == [2, 3, 1] and rows.targets[0, -1] == -1
    assert rows.tokens[2:].max() > 4 and rows.tokens.max() < 9
    bare = make_rows(tmp_path / "none", sample, count=20, vocab_size=9, context=16)
    assert set(bare.kinds) == {RANDOM} and "no tokenizer" in bare.text
    with pytest.raises(CandidateError, match="makes id"):
        make_rows(tmp_path, sample, count=8, vocab_size=3, context=16)


def test_limits():
    assert len({limit.name for limit in LIMITS}) == len(LIMITS)
    assert KL.grade(9e-7) is Status.PASS
    assert KL.grade(2e-6) is Status.WARN
    assert KL.grade(2e-3) is Status.FAIL
    assert KL.grade(2e-6, rounding=1e-6) is Status.PASS
    assert HIDDEN.grade(float("nan")) is Status.FAIL


def test_a_page_says_among_which_experts_a_token_chooses():
    """Two groups of two, the better one by its best expert: as group-limited routing does."""

    def eligible(scores):
        groups = scores.reshape(*scores.shape[:-1], 2, 2).max(axis=-1)
        return np.repeat(groups == groups.max(axis=-1, keepdims=True), 2, axis=-1)

    scores = np.array([[[0.9, 0.1, 0.8, 0.7], [0.2, 0.3, 0.5, 0.4]]])
    limited, free = Choice(1, eligible), Choice(2)
    assert np.flatnonzero(Choice(2, eligible).chosen(scores)).tolist() == [0, 1, 6, 7]
    assert np.flatnonzero(free.chosen(scores)).tolist() == [0, 2, 6, 7]
    assert limited.margin(scores) == pytest.approx(0.1)
    assert Choice(2, eligible).margin(scores) is None, "the next of the group is none"
    moved = scores.copy()
    moved[0, 0, 2] += 0.2  # the other group's best
    found = compare_routing({0: scores}, {0: moved}, choice=limited, shape=(1, 2))
    assert found.layers[0].flips == 1
    assert found.layers[0].margin == pytest.approx(0.1 / scores.std())
