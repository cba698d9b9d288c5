"""Level layers with the experts in groups: the numbers of the whole, and each expert counts."""

import numpy as np
import pytest
from checkpoints.deepseek import DEEPSEEK_V3
from checkpoints.gpt_oss import GPT_OSS
from checkpoints.qwen3_moe import QWEN3_MOE
from helpers import run
from outputs_lab import tensor

from moeconv.verification.candidate import Candidate
from moeconv.verification.models import expert_groups
from moeconv.verification.models.expert_groups import Groups
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.models.source_layers import LayerReader
from moeconv.verification.models.transformers import HfLayers

# Experts of one tensor each, experts in stacked tensors, and experts beside a shared one that a
# router with a bias chooses from groups of its own.
ONE_LAYER = {"base_num_decoder_layers": 2, "scan_layers": False}
MODELS = {
    "qwen3_moe": (QWEN3_MOE, {**ONE_LAYER, "num_experts": 6}),
    "gpt_oss": (GPT_OSS, {**ONE_LAYER, "num_experts": 6}),
    "deepseek": (DEEPSEEK_V3, ONE_LAYER),
}
PARTS = ("attention", "router", "experts", "output")


@pytest.mark.parametrize(
    ("count", "values", "size"),
    [(256, 2**27 * 256, 4), (6, 2**28 * 6, 2), (7, 2**28 * 7, 1), (4, 2**31, 1)],
)
def test_the_largest_groups_that_fit(count, values, size):
    groups = Groups.of(count, values)
    assert groups == Groups(count, size)
    numbers = np.concatenate([np.arange(count)[part] for part in groups])
    assert numbers.tolist() == list(range(count))


def test_experts_that_fit_are_whole():
    assert Groups.of(8, 2**29) is None


@pytest.fixture(scope="module", params=MODELS)
def converted(request, maxtext_lab, tmp_path_factory):
    checkpoint = maxtext_lab.checkpoint(*MODELS[request.param], full_state=True)
    out = tmp_path_factory.mktemp("groups") / request.param
    run(checkpoint, out)
    return checkpoint, out


def hidden_states(checkpoint) -> np.ndarray:
    shape = (1, 64, checkpoint.config["base_emb_dim"])
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def traces(checkpoint, out) -> list:
    """What the last layer of both models computes of the same hidden states."""
    candidate = Candidate.open(out)
    hidden = hidden_states(checkpoint)
    with LayerReader(candidate.arrays, candidate.layout) as read:
        maxtext = MaxTextLayers(checkpoint.config, read, candidate.layout)
        models = maxtext, HfLayers(out)
        return [model.layer(model.num_layers - 1, hidden) for model in models]


def test_groups_give_the_numbers_of_the_whole(converted, monkeypatch):
    whole = traces(*converted)
    monkeypatch.setattr(expert_groups, "EXPERT_BYTES", 1 << 14)
    for right, found in zip(whole, traces(*converted), strict=True):
        for part in PARTS:
            expected, got = getattr(right, part), getattr(found, part)
            assert np.abs(got - expected).max() <= 3e-6 * np.abs(expected).max(), part


def test_a_wrong_expert_in_any_group_is_found(converted, monkeypatch):
    checkpoint, out = converted
    monkeypatch.setattr(expert_groups, "EXPERT_BYTES", 1 << 14)
    right, found = traces(checkpoint, out)
    layer = HfLayers(out)
    names = [name for name in layer._stored if "layers.1." in name and ".experts." in name]
    for expert in range(checkpoint.config["num_experts"]):
        own = [name for name in names if f".experts.{expert}." in name]
        (name,) = [
            name for name in own or names if name.endswith(("down_proj", "down_proj.weight"))
        ]
        values = tensor(out, name)
        entry = values if own else values[expert]
        kept = entry.copy()
        entry[:] *= np.float32(1.01)
        wrong = HfLayers(out).layer(1, hidden_states(checkpoint))
        entry[:] = kept
        apart = np.abs(wrong.experts - right.experts).max()
        assert apart > 100 * np.abs(found.experts - right.experts).max(), f"expert {expert}"
