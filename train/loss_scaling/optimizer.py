"""The loss scale and its counters, around an optax optimizer and inside its state."""

from typing import Any, NamedTuple

from moeconv_train.loss_scaling.settings import LossScaleSettings, Mode


class LossScaleState(NamedTuple):
    """What is kept from step to step, on the device and in every checkpoint."""

    loss_scale: Any  # float32: S of the next step
    good_steps: Any  # int32: since S last changed
    skipped_steps: Any  # int32: since the run began


def with_loss_scale(inner: Any, settings: LossScaleSettings, mode: Mode = "dynamic") -> Any:
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
        return changes, _append(inner_state, _next(scaling, finite, settings, mode))

    return optax.GradientTransformationExtraArgs(init, update)


def _next(
    state: LossScaleState, finite: Any, settings: LossScaleSettings, mode: Mode
) -> LossScaleState:
    """The state after a step."""
    import jax.numpy as jnp

    scale, good, skipped = state
    good = jnp.where(finite, good + 1, 0)
    if mode == "dynamic":
        grows = good >= settings.growth_interval
        larger = jnp.minimum(scale * settings.growth_factor, settings.max)
        smaller = jnp.maximum(scale * settings.backoff_factor, settings.min)
        scale = jnp.where(finite, jnp.where(grows, larger, scale), smaller)
        good = jnp.where(grows, 0, good)
    return LossScaleState(scale, good, skipped + jnp.logical_not(finite))


def _append(inner: Any, scaling: LossScaleState) -> tuple[Any, ...]:
    """A chain's state with one more entry: what Adam keeps stays where MaxText always has it."""
    return (*inner, scaling) if type(inner) is tuple else (inner, scaling)


def _split(state: tuple[Any, ...]) -> tuple[Any, LossScaleState]:
    """The inverse of `_append`: a chain has several entries, what is no chain is one."""
    *inner, scaling = state
    return (inner[0] if len(inner) == 1 else tuple(inner)), scaling
