"""MaxText's functions that the trainer changes are those of the pinned release."""

import pytest
from moeconv_train import seams

from moeconv.errors import UnsupportedError

pytestmark = pytest.mark.maxtext


def test_every_function_is_the_one_that_was_read() -> None:
    assert {name: seams.digest_of(name) for name in seams.SOURCES} == dict(seams.SOURCES)


@pytest.mark.parametrize("name", ["layers.moe:RoutedMoE.dense_matmul", "layers.moe:gone"])
def test_another_function_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(seams, "SOURCES", {**seams.SOURCES, name: "0" * 64})
    seams.check("layers.attention_op", "optimizers")
    with pytest.raises(UnsupportedError, match=f"another {name} than 0.2.5.*install maxtext"):
        seams.check("layers.moe")


def test_a_wrapper_of_ours_does_not_hide_the_source() -> None:
    import functools

    from maxtext.trainers.pre_train import train

    name = "trainers.pre_train.train:train_step"

    @functools.wraps(train.train_step)
    def wrapper(*args: object) -> object:
        return args

    with seams.replaced(train, train_step=wrapper):
        assert train.train_step is wrapper
        assert seams.digest_of(name) == seams.SOURCES[name]
    assert train.train_step is not wrapper
