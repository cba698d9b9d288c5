"""Several arrays in one tensor: gate and up in turn, and query, key and value behind each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from safetensors import safe_open

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import TensorError
from moeconv.execution import engine
from moeconv.families import blocks, targets
from moeconv.mapping.reverse import restore
from moeconv.mapping.rules import EVERY_LAYER, MOE_LAYERS, Rule
from moeconv.tensor.form import Form
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.weights import check_weights

GATE_UP = "model.layers.{L}.mlp.experts.gate_up_proj"
QKV = "model.layers.{L}.self_attn.qkv_proj.weight"
RULES = (
    Rule(("MoeBlock_0.wi_0", "MoeBlock_0.wi_1"), GATE_UP, "E D M -> E D (M g)", layers=MOE_LAYERS),
    Rule(
        ("self_attention.query.kernel", "self_attention.key.kernel", "self_attention.value.kernel"),
        QKV,
        ("D H h -> (H h) D", "D K h -> (K h) D", "D K h -> (K h) D"),
        layers=EVERY_LAYER,
    ),
)
_JOINED = {name for rule in RULES for name in rule.sources}


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch, small_units: None) -> None:
    """A target that is Mixtral but for its fused tensors."""
    mixtral = targets()["mixtral"]
    rules = tuple(r for r in mixtral.rules if not _JOINED & set(r.sources)) + RULES
    monkeypatch.setitem(targets(), "joined", replace(mixtral, name="joined", rules=rules))
    block = blocks()["mixtral"]
    monkeypatch.setitem(blocks(), block.name, replace(block, targets=(*block.targets, "joined")))


def written(out: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def plan(checkpoint: synthetic.Synthetic, **options: Any):
    config = checkpoint.config_file()
    options = {"config": config, "target": "joined", "jobs": 2, **options}
    return plan_conversion(str(checkpoint.step_dir), ConvertOptions(**options))


@pytest.mark.parametrize("split", [{}, {"D": 4}, {"M": 3, "E": 2, "D": 2}], ids=str)
@pytest.mark.parametrize("scanned", [True, False])
def test_what_is_written_is_what_numpy_joins(tmp_path, split, scanned) -> None:
    checkpoint = synthetic.write(tmp_path / "run", scanned=scanned, split=split)
    prepared = plan(checkpoint)
    assert {"decoder.layers.MoeBlock_0.wi_0", "decoder.layers.MoeBlock_0.wi_1"} in [
        each.arrays for each in prepared.plan.assemblies
    ] or not scanned
    convert(prepared, tmp_path / "out")
    found = written(tmp_path / "out")

    def layer(name: str, number: int) -> np.ndarray:
        if not scanned:
            return checkpoint.arrays[f"decoder.layers_{number}.{name}"]
        return checkpoint.arrays[f"decoder.layers.{name}"][:, number]

    for number in range(synthetic.SIZES["L"]):
        gate, up = layer("MoeBlock_0.wi_0", number), layer("MoeBlock_0.wi_1", number)
        both = np.stack([gate, up], -1).reshape(*gate.shape[:-1], -1)
        assert np.array_equal(found[GATE_UP.format(L=number)], both)
        heads = [
            layer(f"self_attention.{name}.kernel", number) for name in ("query", "key", "value")
        ]
        rows = [head.reshape(head.shape[0], -1).T for head in heads]
        assert np.array_equal(found[QKV.format(L=number)], np.concatenate(rows))
    verdict = check_weights(Candidate.open(tmp_path / "out"), jobs=2, memory=2**30)
    assert worst(verdict) is Status.PASS, verdict


def test_the_way_back(tmp_path) -> None:
    checkpoint = synthetic.write(tmp_path / "run")
    prepared = plan(checkpoint)
    edges = tuple(prepared.plan.edges.values())
    made = {e.target: e.apply(lambda source: checkpoint.arrays[source]) for e in edges}
    back = restore(edges, made.__getitem__)
    assert set(back) == set(checkpoint.arrays)
    for name, array in checkpoint.arrays.items():
        assert np.array_equal(back[name], array), name


def test_one_flipped_bit_of_either_part_is_found(tmp_path) -> None:
    checkpoint = synthetic.write(tmp_path / "run")
    convert(plan(checkpoint, max_shard_bytes=10**9), tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    place = plan(checkpoint).plan.output.places[GATE_UP.format(L=1)]
    clean = file.read_bytes()
    for value in (0, 1, 7):
        data = bytearray(clean)
        data[place.offset + 4 * value] ^= 1
        file.write_bytes(data)
        found = check_weights(Candidate.open(tmp_path / "out"), jobs=1, memory=2**30)
        assert [check.tensors for check in found if check.status is Status.FAIL] == [
            [GATE_UP.format(L=1)]
        ]


@pytest.mark.parametrize("after", [3, 9, 15])
def test_a_conversion_that_broke_off_goes_on(tmp_path, monkeypatch, after) -> None:
    checkpoint = synthetic.write(tmp_path / "run", split={"D": 2, "E": 2})
    convert(plan(checkpoint), tmp_path / "whole")
    done, stock = [], engine.Engine._do

    def failing(self, unit, hashers):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(unit)
        stock(self, unit, hashers)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(engine.Engine, "_do", failing)
        convert(plan(checkpoint, jobs=1), tmp_path / "out")
    convert(plan(checkpoint, resume=True), tmp_path / "out")
    one, other = written(tmp_path / "whole"), written(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_part_that_nothing_writes_is_refused(tmp_path, monkeypatch) -> None:
    checkpoint = synthetic.write(tmp_path / "run")
    family = targets()["joined"]
    rules = [rule for rule in family.rules if rule is not RULES[0]]
    alone = replace(RULES[0], source=("MoeBlock_0.wi_0",))
    monkeypatch.setitem(targets(), "joined", replace(family, rules=(*rules, alone)))
    with pytest.raises(TensorError, match=r"exactly once:\n.*MoeBlock_0.wi_1"):
        plan(checkpoint)
    monkeypatch.setattr(Form, "piece_shape", lambda form, ranges: (1,))
    monkeypatch.setitem(targets(), "joined", family)
    with pytest.raises(TensorError, match=r"do not write all of these tensors:\n  model"):
        plan(checkpoint)
