"""MaxText's code that the trainer changes is that of the pinned release."""

import re
from types import SimpleNamespace

import pytest
from moeconv_train import seams
from moeconv_train.preflight import patches

from moeconv.errors import UnsupportedError

pytest.importorskip("maxtext")


def test_every_file_is_the_one_that_was_read() -> None:
    assert {path: seams.digest_of(path) for path in seams.SOURCES} == dict(seams.SOURCES)
    seams.check()


@pytest.mark.parametrize("path", ["layers/moe.py", "layers/gone.py"])
def test_another_file_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(seams, "SOURCES", {**seams.SOURCES, path: "0" * 64})
    seams.check("input_pipeline")
    refused = re.escape(f"has another {path} than 0.2.5") + ".*install maxtext"
    with pytest.raises(UnsupportedError, match=refused):
        seams.check("layers")
    # Before a run, whichever patches it has: the trainer relies on all of them.
    nothing = patches.trainer(fp16_head=False, loss_scale={"mode": "off"})
    with pytest.raises(UnsupportedError, match=refused), nothing:
        pass


def test_what_is_replaced_is_put_back() -> None:
    owner = SimpleNamespace(name=1, other=2)
    with pytest.raises(KeyError), seams.replaced(owner, name=3):
        assert vars(owner) == {"name": 3, "other": 2}
        raise KeyError
    assert vars(owner) == {"name": 1, "other": 2}
