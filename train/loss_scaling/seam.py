"""Where loss scaling goes into MaxText 0.2.5.

- `train.train_step`, which `train_loop` and train_compile.py hand to jit;
- `train.loss_fn`, only while a train step is traced, so that evaluation keeps the stock one;
- `optimizers.get_optimizer`, which train_utils.py `create_training_optimizer` and train_compile.py
  call through the module;
- `MetricLogger._maybe_abort_after_write_metrics`, MaxText's own place to end a broken run.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moeconv_train import seams
from moeconv_train.loss_scaling.optimizer import LossScaleState, with_loss_scale
from moeconv_train.loss_scaling.settings import LossScaleSettings, Mode, check_config

from moeconv.errors import ConfigError, MoeconvError
from moeconv.untrusted import files


@contextlib.contextmanager
def install(settings: LossScaleSettings) -> Iterator[None]:
    """While this is open, MaxText trains with loss scaling where `settings` say so for its dtype.

    It must be open when MaxText builds the optimizer and when it traces the step: keep it open
    around all of a run, or of an ahead-of-time compile.

    Raises:
        UnsupportedError: MaxText is not the release that this fits into.
    """
    from maxtext.common.metric_logger import MetricLogger
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train

    seams.check(
        "trainers.pre_train.train:", "optimizers", "utils.train_utils", "common.metric_logger"
    )
    optimizer = _scaled_optimizer(optimizers.get_optimizer, settings)
    abort = _give_up(MetricLogger._maybe_abort_after_write_metrics, settings.patience)
    with (
        seams.replaced(train, train_step=_scaled_train_step(train, settings)),
        seams.replaced(optimizers, get_optimizer=optimizer),
        seams.replaced(MetricLogger, _maybe_abort_after_write_metrics=abort),
    ):
        yield


def _scaled_optimizer(stock: Callable[..., Any], settings: LossScaleSettings) -> Callable[..., Any]:
    """`get_optimizer`, its result wrapped when the run's dtype asks for it."""

    @functools.wraps(stock)
    def get_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        mode = settings.mode_for(config.dtype)
        _check_resume(config, mode)
        optimizer = stock(config, *args, **kwargs)
        if mode == "off":
            return optimizer
        check_config(config)
        return with_loss_scale(optimizer, settings, mode)

    return get_optimizer


def _check_resume(config: Any, mode: Mode) -> None:
    """Says in words what Orbax would say in pages: the states with and without a scale differ."""
    directory = Path(config.checkpoint_dir or "")
    steps = directory.iterdir() if config.enable_checkpointing and directory.is_dir() else ()
    for step in steps:
        if not (step.name.isdecimal() and (step / "items" / "_METADATA").exists()):
            continue
        has = b"'loss_scale'" in files.read_inside(step / "items", "_METADATA")
        if has != (mode != "off"):
            raise ConfigError(
                f"{step} was saved {'with' if has else 'without'} a loss scale, and this run's is "
                f"{mode}: set its mode to {'dynamic' if has else 'off'}, or begin a new run_name."
            )


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
        if settings.mode_for(config.dtype) == "off":
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


def _give_up(stock: Callable[..., None], patience: int) -> Callable[..., None]:
    """MaxText's check of each step's metrics, which also ends a run that only skips."""
    skips = 0

    @functools.wraps(stock)
    def check(self: Any, metrics: Any) -> None:
        nonlocal skips
        stock(self, metrics)
        scalars = metrics["scalar"]
        skips = skips + 1 if scalars.get("learning/overflow", 0) else 0
        if skips >= patience:
            raise MoeconvError(
                f"the loss or the gradients of {skips} steps in a row were not finite, in the end "
                f"at a loss scale of {float(scalars['learning/loss_scale']):g}: FP16 itself "
                "overflows in this model (see docs/fp16.md); begin a new run_name with a lower "
                "learning_rate or dtype=float32"
            )

    return check
