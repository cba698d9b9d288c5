"""Loss scaling and the FP16 head in MaxText's own train step, on a small interleaved tied MoE."""

import re
from types import SimpleNamespace

import fp16_lab
import numpy as np
import pytest
from moeconv_train import fp16_head, loss_scaling
from moeconv_train.loss_scaling import LossScaleSettings
from pydantic import ValidationError

from moeconv.errors import ConfigError

pytestmark = pytest.mark.maxtext

# A vocabulary that makes a token's share of the gradient as small as a large batch does:
# 16,384 x 816 predicted tokens. No clipping, so that Adam's first moment is the gradient.
KEYS = {"base_num_decoder_layers": 2, "vocab_size": 16384, "gradient_clipping_threshold": 0.0}
SETTINGS = LossScaleSettings(growth_interval=2)


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    with fp16_lab.little_optimisation():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fp16")


@pytest.fixture(scope="module")
def reference(directory):
    """The gradient in fp32."""
    return fp16_lab.Stepper.make({**fp16_lab.FP32, **KEYS}, directory).gradient()


@pytest.fixture(scope="module")
def scaled(directory):
    """A run with loss scaling and the head, that can be saved."""
    keys = {**fp16_lab.FP16, **KEYS, "enable_checkpointing": True}
    with loss_scaling.install(SETTINGS), fp16_head.install():
        stepper = fp16_lab.Stepper.make(keys, directory, "scaled")
        stepper.compile()
    return stepper


@pytest.mark.proof("loss scaling of a step")
def test_without_scaling_gradients_are_wrong(directory, reference):
    with loss_scaling.install(LossScaleSettings(mode="off")), fp16_head.install():
        plain = fp16_lab.Stepper.make({**fp16_lab.FP16, **KEYS}, directory)
        gradient = plain.gradient()
    assert not any("loss_scale" in name for name in plain.leaves())
    assert fp16_lab.error(gradient, reference) > 0.05


@pytest.mark.proof("loss scaling of a step")
@pytest.mark.parametrize("exponent", [12, 15, 18])
def test_with_scaling_gradients_are_those_of_fp32(scaled, reference, exponent):
    gradient = scaled.gradient(loss_scale=2.0**exponent)
    assert fp16_lab.flushed(gradient, reference) < 1e-3
    assert fp16_lab.error(gradient, reference) < 5e-3


def test_an_overflow_changes_nothing_but_the_scale(scaled):
    scaled.reset(loss_scale=2.0**15)
    scaled.step(seed=1)
    scaled.set(loss_scale=2.0**40)
    before = scaled.leaves()
    metrics = scaled.step(seed=2)
    after = scaled.leaves()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {name.rsplit(".", 1)[-1] for name in changed} == {
        "step", "loss_scale", "good_steps", "skipped_steps"
    }  # fmt: skip
    assert not np.isfinite(metrics["learning/raw_grad_norm"])
    assert np.isfinite(metrics["learning/loss"])
    assert metrics["learning/loss_scale"] == 2.0**40
    assert (metrics["learning/overflow"], metrics["learning/skipped_steps"]) == (1, 1)
    assert scaled.scaling() == (2.0**39, 0, 1)

    scaled.set(loss_scale=2.0**15)
    metrics = scaled.step(seed=2)
    assert (metrics["learning/overflow"], metrics["learning/skipped_steps"]) == (0, 1)
    # Adam and the schedule count what was done, MaxText's step what was tried.
    leaves = scaled.leaves()
    assert leaves["optimizer.opt_state.0.count"] == leaves["optimizer.opt_state.2.count"] == 2
    assert leaves["optimizer.step"] == 3


def test_the_scale_grows_after_good_steps_and_metrics_say_so(scaled):
    scaled.reset(loss_scale=2.0**10)
    seen = [scaled.step(seed)["learning/loss_scale"] for seed in range(5)]
    assert seen == [2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**12]
    assert scaled.scaling() == (2.0**12, 1, 0)


@pytest.mark.proof("loss scaling of a step")
def test_a_checkpoint_resumes_to_the_bit(scaled, directory):
    """Saved and restored by MaxText between an overflow and the growth after it."""
    scaled.reset(loss_scale=2.0**40)
    scaled.step(seed=0)
    scaled.set(loss_scale=2.0**14)
    scaled.step(seed=1)
    scaled.save()
    for seed in (2, 3, 4):
        scaled.step(seed)
    whole = scaled.leaves()

    with loss_scaling.install(SETTINGS), fp16_head.install():
        resumed = fp16_lab.Stepper.make(dict(scaled.keys), directory, "scaled", like=scaled)
        assert resumed.scaling() == (2.0**14, 1, 1)
        for seed in (2, 3, 4):
            resumed.step(seed)
    assert resumed.scaling() == (2.0**16, 0, 1)
    leaves = resumed.leaves()
    assert {name for name in whole if whole[name].tobytes() != leaves[name].tobytes()} == set()


def test_the_head_multiplies_fp16_and_adds_up_in_fp32(scaled):
    """In the train step as lowered, where nothing depends on what a compiler makes of it."""
    # operands and result of each matmul with the vocabulary's axis
    shapes = r"\(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>"
    dots = [
        re.search(shapes, line).groups()
        for line in scaled.text.splitlines()
        if "stablehlo.dot_general" in line and "16384" in line
    ]
    assert len(dots) == 3  # forward, and for either operand's gradient
    for dot in dots:
        assert [tensor[-3:] for tensor in dot] == ["f16", "f16", "f32"]
    assert "bf16" not in scaled.text


def test_for_a_gpu_the_accumulator_is_named(directory):
    """What is lowered for CUDA, with fp16 and with fp32 logits: fp16 operands, fp32 sums."""
    import jax
    import jax.numpy as jnp

    y = jnp.zeros((2, 8, 16), jnp.float16)
    weights = jnp.zeros((32, 16), jnp.float32)
    for logits in (jnp.float16, jnp.float32):

        def loss(y, weights, logits=logits):
            return fp16_head.attend(y, weights, logits).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        text = step.trace(y, weights).lower(lowering_platforms=("cuda",)).as_text()
        dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(dots) == 2  # the sum's gradient needs no logits
        for dot in dots:
            assert "lhs_precision_type = f16, rhs_precision_type = f16" in dot
            assert "accumulation_type = f32" in dot
            assert not re.search(r"tensor<[^>]*xf32>, |, tensor<[^>]*xf32>\) ->", dot)
        forward = jax.jit(lambda y, w, logits=logits: fp16_head.attend(y, w, logits))
        text = forward.trace(y, weights).lower(lowering_platforms=("cuda",)).as_text()
        assert "accumulation_type = f32" in text
        result = {jnp.float16: "f16", jnp.float32: "f32"}[logits]
        assert f"-> tensor<2x8x32x{result}>" in text


def test_the_head_is_the_product(directory):
    """Against float64, forward and backward, to fp16's rounding of the operands."""
    import jax
    import jax.numpy as jnp

    draw = np.random.default_rng(0)
    y = draw.standard_normal((2, 8, 64)).astype(np.float16)
    weights = draw.standard_normal((96, 64)).astype(np.float32)
    cotangent = draw.standard_normal((2, 8, 96)).astype(np.float16)
    logits, back = jax.vjp(lambda y, w: fp16_head.attend(y, w, jnp.float32), y, weights)
    dy, dweights = back(cotangent.astype(np.float32))
    rounded, wide = weights.astype(np.float16).astype(np.float64), y.astype(np.float64)
    assert (logits.dtype, dy.dtype, dweights.dtype) == (np.float32, np.float16, np.float32)
    np.testing.assert_allclose(logits, wide @ rounded.T, atol=2e-5)
    np.testing.assert_allclose(dy, cotangent.astype(np.float64) @ rounded, rtol=1e-3, atol=1e-2)
    expected = np.einsum("btv,btd->vd", cotangent.astype(np.float64), wide)
    # As every other weight's gradient, once to fp16.
    np.testing.assert_allclose(dweights, expected, rtol=2**-11, atol=2e-5)


def test_everything_is_put_back():
    from maxtext.layers import nnx_decoders
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train

    def names():
        return (
            train.train_step,
            train.loss_fn,
            optimizers.get_optimizer,
            nnx_decoders.attend_on_embedding,
        )

    stock = names()
    with pytest.raises(KeyError), loss_scaling.install(SETTINGS), fp16_head.install():
        changed = [a is not b for a, b in zip(names(), stock, strict=True)]
        assert changed == [True, True, True, True]
        raise KeyError
    assert names() == stock


def test_a_loss_that_is_not_finite_has_no_gradient_that_is():
    """Its step is left out, also where the backward pass does not notice."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from moeconv_train.loss_scaling import _scaled_loss_fn

    class Model(nnx.Module):
        def __init__(self):
            self.weights = nnx.Param(jnp.arange(1.0, 4.0))

    def stock(model, added):
        return jnp.sum(model.weights[...] ** 2) + jax.lax.stop_gradient(added), None

    scaled = nnx.value_and_grad(_scaled_loss_fn(stock, jnp.float32(2.0**10)), has_aux=True)
    for added in (0.0, jnp.inf, jnp.nan):
        (loss, _), gradient = scaled(Model(), jnp.float32(added))
        expected = [2, 4, 6] if added == 0 else [np.nan] * 3
        assert np.isfinite(loss) == (added == 0)
        np.testing.assert_array_equal(gradient["weights"][...], expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 1000}, "initial must be a power of two, not 1000"),
        ({"initial": 2.0**30}, "initial must lie between min and max"),
        ({"growth_factor": 1.5}, "growth_factor must be a power of two"),
        ({"backoff_factor": 1.0}, "less than 1"),
        ({"min": 0}, "min must be a power of two"),
        ({"max": float("inf")}, "max must be a power of two"),
        ({"mode": "auto"}, "mode"),
        ({"scale": 1}, "scale"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        LossScaleSettings(**fields)


def test_the_mode_follows_the_dtype():
    assert LossScaleSettings().scales("float16") and not LossScaleSettings().scales("float32")
    assert LossScaleSettings(mode="dynamic").scales("float32")
    assert not LossScaleSettings(mode="off").scales("float16")


def test_a_scale_can_be_told_to_stay():
    """Overflows are left out all the same."""
    import jax.numpy as jnp
    import optax

    settings = LossScaleSettings(initial=8, min=8, max=8, growth_interval=1)
    optimizer = loss_scaling.with_loss_scale(optax.sgd(1.0), settings)
    state = optimizer.init(jnp.zeros(2))
    for gradient, change in (([1.0, 2.0], [-1, -2]), ([1.0, np.inf], [0, 0])):
        changes, state = optimizer.update(jnp.asarray(gradient), state)
        np.testing.assert_array_equal(changes, change)
    assert (state[-1].loss_scale, state[-1].skipped_steps) == (8, 1)


@pytest.mark.parametrize(
    "keys",
    [
        {"weight_dtype": "float16"},
        {"grad_dtype": "float16"},
        {"optimizer_memory_host_offload": True},
        {"compiled_trainstep_file": "step.pickle"},
    ],
)
def test_what_does_not_go_with_scaling_is_refused(keys, directory):
    fine = fp16_lab.resolve(dict(fp16_lab.FP16), directory)
    loss_scaling.check_config(fine)
    wrong = SimpleNamespace(**{**fine.get_keys(), **keys})
    with pytest.raises(ConfigError, match=next(iter(keys))):
        loss_scaling.check_config(wrong)
