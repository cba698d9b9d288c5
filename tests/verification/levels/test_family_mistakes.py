"""Mistakes that a family's page could make: each fails at the lowest level that can see it.

A page that is wrong is wrong for convert and for verify alike, so levels structure and weights find
its output right. MaxText and transformers, which run it, do not. A tensor that is not what the page
says is seen by level weights.
"""

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import ROWS
from checkpoints.mistakes import key
from helpers import config_file, run
from parity_lab import Compiled, check

from moeconv.errors import TensorError
from moeconv.families import blocks, targets
from moeconv.hf.safetensors import read_header
from moeconv.verification.checks import Status, worst
from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.settings import ParityOptions

pytestmark = [pytest.mark.slow, pytest.mark.proof("mistakes of families"), pytest.mark.maxtext]
# Those that have a mistake to be found.
FAMILIES = {name: row for name, row in ROWS.items() if row.mistakes}


def made(lab, family):
    """The checkpoint in which a family's mistakes are looked for."""
    return lab.checkpoint(FAMILIES[family].model, FAMILIES[family].mistaken_model)


def each(attribute):
    """Every family with every entry of an attribute of its row, in the proof of the row."""
    return [
        pytest.param(family, entry, marks=pytest.mark.proof(row.proof or f"mistakes of {family}"))
        for family, row in FAMILIES.items()
        for entry in getattr(row, attribute)
    ]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    monkeypatch.setattr("moeconv.verification.levels.layers.MaxTextLayers", Compiled)
    monkeypatch.setattr("moeconv.verification.levels.logits.MaxTextLayers", Compiled)
    monkeypatch.setattr("moeconv.verification.levels.logits.MaxTextModel.load", _loaded)


_stock = MaxTextModel.load
_models: dict[str, MaxTextModel] = {}


def _loaded(items, config, *, dtype="float32"):
    key = repr((items, sorted(config.items()), dtype))
    if key not in _models:
        _models[key] = _stock(items, config, dtype=dtype)
    return _models[key]


def words(found):
    return {name: each.summary for name, each in found.items()}


@pytest.mark.parametrize(("family", "mistake"), each("mistakes"))
def test_a_mistaken_page_is_found_by_running_it(
    maxtext_lab, tmp_path, monkeypatch, family, mistake
):
    mistaken, place = FAMILIES[family].mistakes[mistake]
    architecture = FAMILIES[family].architecture
    right = next(page for page in targets().values() if page.architecture == architecture)
    monkeypatch.setitem(targets(), right.name, mistaken(right))
    run(made(maxtext_lab, family), tmp_path / "out")
    for level in ("structure", "weights"):
        found = check(level, tmp_path / "out")
        assert worst(found.values()) is Status.PASS, words(found)
    found = check("logits", tmp_path / "out")
    assert found["parity"].status is Status.FAIL, words(found)
    found = check("layers", tmp_path / "out")
    assert found["hidden"].status is Status.FAIL, words(found)
    assert found["hidden"].summary.split(": ")[0].endswith(place), words(found)


@pytest.mark.proof("mistakes of Gemma")
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_an_uncapped_head_is_found_by_its_logits(maxtext_lab, tmp_path, monkeypatch, family):
    mistaken = key("final_logit_softcapping", lambda cap: None)(targets()[family])
    monkeypatch.setitem(targets(), family, mistaken)
    run(made(maxtext_lab, family), tmp_path / "out")
    for level in ("logits", "layers"):
        found = check(level, tmp_path / "out")
        assert found["parity"].status is Status.FAIL, words(found)
    assert found["hidden"].status is Status.PASS, words(found)


@pytest.mark.proof("mistakes of Gemma")
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_layers_in_another_order_are_found_by_their_logits(
    maxtext_lab, tmp_path, monkeypatch, family
):
    """What is behind the blocks put before them, a pair turned round: MaxText itself says so."""
    block = blocks()[family]
    ways = []
    for way in block.stackings:
        turned = (replace(each, modules=each.modules[::-1]) for each in way.segments[::-1])
        ways.append(replace(way, segments=tuple(turned)))
    monkeypatch.setitem(blocks(), family, replace(block, stackings=tuple(ways)))
    run(made(maxtext_lab, family), tmp_path / "out")
    for level in ("structure", "weights"):
        found = check(level, tmp_path / "out")
        assert worst(found.values()) is Status.PASS, words(found)
    with pytest.raises(TensorError, match="not in the order that the checkpoint's layout says"):
        check("logits", tmp_path / "out")


@pytest.mark.parametrize("layers", [0, 2])
def test_dense_layers_elsewhere_are_found_by_the_structure(
    maxtext_lab, tmp_path, monkeypatch, layers
):
    mistaken = key("first_k_dense_replace", lambda n: layers)(targets()["deepseek_v3"])
    monkeypatch.setitem(targets(), "deepseek_v3", mistaken)
    run(made(maxtext_lab, "deepseek_v3"), tmp_path / "out")
    found = check("structure", tmp_path / "out")
    assert worst(found.values()) is Status.FAIL, words(found)


def zeroed(out, name):
    (file,) = out.glob("*.safetensors")
    spec, offset = read_header(file)[name]
    np.memmap(file, np.float32, "r+", offset=offset, shape=spec.shape)[:] = 0


@pytest.mark.parametrize(("family", "name"), each("lost"))
def test_a_tensor_that_was_lost_is_found_by_its_values(maxtext_lab, tmp_path, family, name):
    run(made(maxtext_lab, family), tmp_path / "out")
    zeroed(tmp_path / "out", name)
    found = check("weights", tmp_path / "out")
    assert [c.tensors for c in found.values() if c.status is Status.FAIL] == [[name]]


@pytest.mark.parametrize(("family", "told"), each("told_wrong"))
def test_what_the_conversion_was_told_wrong_is_found(maxtext_lab, tmp_path, family, told):
    checkpoint = made(maxtext_lab, family)
    run(checkpoint, tmp_path / "out", sets=(told,))
    config = config_file(tmp_path / "config", checkpoint.config)
    found = check("layers", tmp_path / "out", ParityOptions(config=config))
    assert found["description"].status is Status.FAIL, words(found)
    assert told.partition("=")[0] in found["description"].summary
    assert found["hidden"].status is Status.FAIL, words(found)


def test_the_right_pages_pass(maxtext_lab, tmp_path):
    """Without which the tests above would show nothing."""
    for family in FAMILIES:
        run(made(maxtext_lab, family), tmp_path / family)
        for level in ("logits", "layers"):
            found = check(level, tmp_path / family)
            assert found.pop("reference").status is Status.WARN
            assert worst(found.values()) is Status.PASS, words(found)
