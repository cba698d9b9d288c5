"""Loss scaling in every way the step can be built, and through MaxText's own training loop."""

import functools

import fp16_lab
import numpy as np
import pytest
from moeconv_train import fp16_head, loss_scaling
from moeconv_train.logs import metrics
from moeconv_train.loss_scaling import LossScaleSettings

pytestmark = [pytest.mark.proof("loss scaling"), pytest.mark.maxtext]

KEYS = {
    "base_num_decoder_layers": 2,
    "gradient_clipping_threshold": 0.0,  # so that Adam's first moment is the gradient
    "float32_logits": True,
}
SETTINGS = LossScaleSettings(growth_interval=2)
# Models with gradients of their own: another one, other parameters for it, or another optimizer.
MODELS = {
    "plain": {},
    "scanned": {"scan_layers": True},
    "untied, adam_pax": {"logits_via_embedding": False, "opt_type": "adam_pax"},
    "all MoE": {"decoder_block": "mixtral"},
}
# 16 rows a step in each: batches are per device of the four that conftest.py makes.
WAYS = {
    "scanned, fp32 logits": ("scanned", {"logits_dot_in_fp32": True}),
    "rematerialised, vocabulary in tiles": (
        "plain",
        {"remat_policy": "minimal_with_context", "num_vocab_tiling": 4},
    ),
    "accumulated on two devices": (
        "plain",
        {
            "ici_data_parallelism": 2,
            "gradient_accumulation_steps": 2,
            "per_device_batch_size": 2,
        },
    ),
    "untied, adam_pax": ("untied, adam_pax", {}),
    "all MoE on two devices": ("all MoE", {"ici_data_parallelism": 2}),
}
# Those whose train state is another: what a checkpoint holds, and on which devices.
STATES = ("scanned, fp32 logits", "accumulated on two devices", "untied, adam_pax")


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    with fp16_lab.little_optimisation():
        yield


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The gradients in fp32, stock MaxText's."""
    directory = tmp_path_factory.mktemp("fp32")

    @functools.cache
    def reference(model):
        keys = {**fp16_lab.FP32, **KEYS, **MODELS[model]}
        return fp16_lab.Stepper.make(keys, directory, model).gradient()

    return reference


@pytest.mark.parametrize("way", WAYS)
def test_gradients_overflow_and_resume(way, references, tmp_path):
    """The gradient is fp32's, an overflow changes nothing, a restored run goes on to the bit."""
    model, how = WAYS[way]
    reference = references(model)
    keys = {**fp16_lab.FP16, **KEYS, **MODELS[model], **how, "enable_checkpointing": way in STATES}
    with loss_scaling.install(SETTINGS), fp16_head.install():
        whole = fp16_lab.Stepper.make(keys, tmp_path, "whole")
        gradient = whole.gradient(loss_scale=2.0**15)
    assert set(gradient) == set(reference) != set()
    assert fp16_lab.error(gradient, reference) < 0.01
    assert fp16_lab.flushed(gradient, reference) < 1e-3

    whole.set(loss_scale=2.0**60)
    before = whole.leaves()
    assert whole.step(seed=1)["learning/overflow"] == 1
    after = whole.leaves()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {name.rsplit(".", 1)[-1] for name in changed} == {
        "step", "loss_scale", "good_steps", "skipped_steps"
    }  # fmt: skip

    if way not in STATES:
        return
    whole.set(loss_scale=2.0**14)
    whole.step(seed=2)
    whole.save()
    with loss_scaling.install(SETTINGS), fp16_head.install():
        resumed = fp16_lab.Stepper.make(keys, tmp_path, "whole", like=whole)
        assert resumed.scaling() == whole.scaling() == (2.0**14, 1, 1)
    for seed in (3, 4):
        whole.step(seed)
        resumed.step(seed)
    expected, found = whole.leaves(), resumed.leaves()
    assert whole.scaling() == (2.0**15, 1, 1)
    assert {n for n in expected if expected[n].tobytes() != found[n].tobytes()} == set()


class Rows:
    """What MaxText's loop measured, in order, evaluations too."""

    def __init__(self):
        self.steps, self.evaluations = [], []

    def begin(self, start_step):
        """Every step is asked for by `loop`."""

    def train(self, scalars, step, paused, late=False):
        self.steps.append({name: float(value) for name, value in scalars.items()})

    def evaluation(self, scalars, step):
        self.evaluations.append((step, float(scalars["eval/avg_loss"])))


def loop(keys, directory, run, settings):
    """MaxText's own loop to its end, and what it measured."""
    from maxtext.trainers.pre_train import train

    config = fp16_lab.resolve({**keys, "enable_checkpointing": True}, directory, run)
    rows = Rows()
    with loss_scaling.install(settings), fp16_head.install(), metrics.install(rows):
        train.train_loop(config, None)
    return rows


def test_maxtexts_loop_logs_evaluates_and_resumes(tmp_path, monkeypatch):
    """Synthetic data are one batch again and again, so a resumed run sees what it would have."""
    monkeypatch.chdir(tmp_path)
    settings = LossScaleSettings(initial=2.0**26, max=2.0**26, growth_interval=2)
    keys = {
        **fp16_lab.FP16,
        "base_num_decoder_layers": 2,
        "ici_data_parallelism": 4,
        "per_device_batch_size": 2,
        "steps": 10,
        "checkpoint_period": 5,
        "eval_interval": 4,
        "eval_steps": 1,
        "save_checkpoint_on_completion": True,
        # The same schedule whatever `steps` is.
        "learning_rate_schedule_steps": 10,
    }
    whole = loop(keys, tmp_path, "whole", settings)
    scales = [row["learning/loss_scale"] for row in whole.steps]
    skipped = [row["learning/overflow"] for row in whole.steps]
    assert len(whole.steps) == 10
    assert scales[0] == 2.0**26 and skipped[0] == 1 and 0 in skipped
    assert [row["learning/skipped_steps"] for row in whole.steps] == np.cumsum(skipped).tolist()
    for scale, overflow, following in zip(scales, skipped, scales[1:], strict=False):
        assert following == scale / 2 if overflow else following in (scale, 2 * scale)
    assert all(np.isfinite(row["learning/loss"]) for row in whole.steps)
    assert [step for step, loss in whole.evaluations if np.isfinite(loss)] == [0, 4, 8]

    loop({**keys, "steps": 5}, tmp_path, "parts", settings)
    loop(keys, tmp_path, "parts", settings)
    last = tmp_path.glob("*/checkpoints/9/items")
    first, second = (params(items) for items in sorted(last))
    assert set(first) == set(second)
    assert any("loss_scale" in name for name in first)
    assert {n for n in first if first[n].tobytes() != second[n].tobytes()} == set()


def params(items):
    """Every array of a checkpoint but the random streams', by dotted name."""
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load(items.parent, checkpointable_name="items")
    flat = {}

    def walk(node, name):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            path = f"{name}.{key}"
            if isinstance(child, (dict, list, tuple)):
                walk(child, path)
            elif child is not None:
                flat[path] = np.asarray(child)

    tree.pop("nnx_aux", None)
    walk(tree, "")
    return flat
