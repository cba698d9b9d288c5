"""Dynamic loss scaling for unmodified MaxText, which has none: FP16 gradients that do not flush.

Only cotangents are scaled: by S where they enter at the loss, by 1/S in fp32 where they leave at
each parameter. S is a power of two, so this rounds nothing, and loss, metrics, clipping, Adam and
decay see true units. A step whose gradients are not finite is left out and halves S. S and its
counters live in the optimizer's state, so that MaxText saves and restores them.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from moeconv_train import seams
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Mode = Literal["dynamic", "off"]
# Settings of MaxText that must be wide (fp16 flushes there what the scale saved), or must be off.
_WIDE = ("weight_dtype", "grad_dtype")
_OFF = (
    "optimizer_memory_host_offload",
    "parameter_memory_host_offload",
    "enable_diloco",
    "quantization",
    "compiled_trainstep_file",
)


class LossScaleSettings(BaseModel):
    """Every number but the counts is a power of two, so that scaling rounds nothing.

    The defaults are those of PyTorch's GradScaler with half its initial scale. With the loss a mean
    over a batch's tokens, 2^10 to 2^18 serve equally well, and growth finds more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Annotated[Mode | None, BeforeValidator(lambda told: "off" if told is False else told)] = (
        Field(None, description="None: dynamic for dtype float16, else off.")
    )  # YAML reads the word off as false
    initial: float = Field(2.0**15, description="S of the first step.")
    growth_interval: int = Field(2000, ge=1, description="Good steps in a row before S grows.")
    growth_factor: float = Field(2.0, ge=1)
    backoff_factor: float = Field(0.5, lt=1)
    min: float = 1.0
    max: float = 2.0**24
    patience: int = Field(50, ge=1, description="Skipped steps in a row that end the run.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("initial", "growth_factor", "backoff_factor", "min", "max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and math.frexp(value)[0] == 0.5):
                raise ValueError(f"{name} must be a power of two, not {value:g}")
        if not self.min <= self.initial <= self.max:
            raise ValueError(f"initial must lie between min and max, {self.min:g} and {self.max:g}")
        return self

    def scales(self, dtype: Any) -> bool:
        """Whether the loss of a run is scaled whose MaxText `dtype` is this."""
        return self.mode == "dynamic" if self.mode else np.dtype(dtype) == np.float16


def check_config(config: Any) -> None:
    """Refuses settings of MaxText under which scaled gradients would be lost or wrong."""
    wrong = {
        **{key: np.dtype(getattr(config, key)) == np.float16 for key in _WIDE},
        **{key: getattr(config, key) for key in _OFF},
    }
    seams.refuse(wrong, "loss scaling", "run.loss_scale.mode=off")


@contextlib.contextmanager
def install(settings: LossScaleSettings) -> Iterator[None]:
    """While this is open, MaxText trains with loss scaling where `settings` say so for its dtype.

    It replaces `train.train_step`, which `train_loop` and train_compile.py hand to jit, and while
    that is traced `train.loss_fn`, so that evaluation keeps the stock one; and `get_optimizer`.

    It must be open when MaxText builds the optimizer and when it traces the step: keep it open
    around all of a run, or of an ahead-of-time compile.
    """
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train

    optimizer = _scaled_optimizer(optimizers.get_optimizer, settings)
    with (
        seams.replaced(train, train_step=_scaled_train_step(train, settings)),
        seams.replaced(optimizers, get_optimizer=optimizer),
    ):
        yield


class LossScaleState(NamedTuple):
    """What is kept from step to step, on the device and in every checkpoint."""

    loss_scale: Any  # float32: S of the next step
    good_steps: Any  # int32: since S last changed
    skipped_steps: Any  # int32: since the run began


def with_loss_scale(inner: Any, settings: LossScaleSettings) -> Any:
    """The optax optimizer `inner`, leaving out steps whose gradients are not finite.

    Such a step changes neither parameters nor anything of `inner`'s state, so Adam's count and the
    schedule's stand still too: the learning rate is the schedule's at `step - skipped_steps`.
    Gradients come in true units: nothing is scaled here.
    """
    import jax
    import jax.numpy as jnp
    import optax

    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> tuple[Any, ...]:
        zero = jnp.zeros((), jnp.int32)
        scaling = LossScaleState(jnp.float32(settings.initial), zero, zero)
        return _append(inner.init(params), scaling)

    def update(updates: Any, state: tuple[Any, ...], params: Any = None, **extra: Any) -> Any:
        inner_state, scaling = _split(state)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]).all()

        def apply() -> Any:
            return inner.update(updates, inner_state, params, **extra)

        def skip() -> Any:
            # x + -0.0 is x in every bit; x + 0.0 would turn -0.0 into 0.0.
            shapes, _ = jax.eval_shape(apply)
            return jax.tree.map(lambda x: jnp.full(x.shape, -0.0, x.dtype), shapes), inner_state

        changes, inner_state = jax.lax.cond(finite, apply, skip)
        return changes, _append(inner_state, _next(scaling, finite, settings))

    return optax.GradientTransformationExtraArgs(init, update)


def _next(state: LossScaleState, finite: Any, settings: LossScaleSettings) -> LossScaleState:
    """The state after a step."""
    import jax.numpy as jnp

    scale, good, skipped = state
    good = jnp.where(finite, good + 1, 0)
    grows = good >= settings.growth_interval
    larger = jnp.minimum(scale * settings.growth_factor, settings.max)
    smaller = jnp.maximum(scale * settings.backoff_factor, settings.min)
    return LossScaleState(
        jnp.where(finite, jnp.where(grows, larger, scale), smaller),
        jnp.where(grows, 0, good),
        skipped + jnp.logical_not(finite),
    )


def _append(inner: Any, scaling: LossScaleState) -> tuple[Any, ...]:
    """A chain's state with one more entry: what Adam keeps stays where MaxText always has it."""
    return (*inner, scaling) if type(inner) is tuple else (inner, scaling)


def _split(state: tuple[Any, ...]) -> tuple[Any, LossScaleState]:
    """The inverse of `_append`: a chain has several entries, what is no chain is one."""
    *inner, scaling = state
    return (inner[0] if len(inner) == 1 else tuple(inner)), scaling


def _scaled_optimizer(stock: Callable[..., Any], settings: LossScaleSettings) -> Callable[..., Any]:
    """`get_optimizer`, its result wrapped when the run's dtype asks for it."""

    @functools.wraps(stock)
    def get_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = stock(config, *args, **kwargs)
        if not settings.scales(config.dtype):
            return optimizer
        check_config(config)
        return with_loss_scale(optimizer, settings)

    return get_optimizer


def _scaled_train_step(train: Any, settings: LossScaleSettings) -> Callable[..., Any]:
    """`train_step`, traced with a `loss_fn` whose cotangents are scaled by the state's own S."""
    stock = train.train_step

    @functools.wraps(stock)
    def train_step(
        model: Any,
        config: Any,
        state_mesh_shardings: Any,
        params_shardings: Any,
        state: Any,
        data: Any,
        dropout_rng: Any = None,
    ) -> Any:
        arguments = (model, config, state_mesh_shardings, params_shardings)
        if not settings.scales(config.dtype):
            return stock(*arguments, state, data, dropout_rng)
        before = _scaling(state)
        with seams.replaced(train, loss_fn=_scaled_loss_fn(train.loss_fn, before.loss_scale)):
            state, metrics = stock(*arguments, state, data, dropout_rng)
        after = _scaling(state)
        metrics["scalar"] |= {
            "learning/loss_scale": before.loss_scale,
            "learning/skipped_steps": after.skipped_steps,
            "learning/overflow": after.skipped_steps - before.skipped_steps,
        }
        return state, metrics

    return train_step


def _scaled_loss_fn(stock: Callable[..., Any], scale: Any) -> Any:
    """`loss_fn`: the same values, cotangents times `scale` inside and true at the parameters.

    A loss that is not finite has no gradient that is: its step is left out, whatever the backward
    pass would make of it.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    @jax.custom_vjp
    def scaled(x: Any, by: Any) -> Any:
        return x

    def backward(by: Any, cotangent: Any) -> tuple[Any, Any]:
        return (cotangent * by).astype(cotangent.dtype), jnp.zeros_like(by)

    scaled.defvjp(lambda x, by: (x, by), backward)

    @functools.wraps(stock)  # nnx.value_and_grad reads the signature
    def loss_fn(model: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: scaled(x, 1 / scale), parameters))
        try:
            loss, aux = stock(model, *args, **kwargs)
        finally:
            nnx.update(model, parameters)
        return scaled(loss, jnp.where(jnp.isfinite(loss), scale, jnp.nan)), aux

    return loss_fn


def _scaling(state: Any) -> LossScaleState:
    """The loss scale's state inside of MaxText's train state."""
    from flax import nnx

    return LossScaleState(
        **{
            path[-1]: variable.get_value()
            for path, variable in nnx.to_flat_state(state)
            if path[0] == "optimizer" and path[-1] in LossScaleState._fields
        }
    )
