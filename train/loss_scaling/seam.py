"""Where loss scaling goes into MaxText 0.2.5: what is replaced, and what must be there for it.

- `train.train_step`, which `train_loop` and train_compile.py hand to jit;
- `train.loss_fn`, only while a train step is traced, so that evaluation keeps the stock one;
- `optimizers.get_optimizer`, which train_utils.py `create_training_optimizer` and train_compile.py
  call through the module;
- `MetricLogger._maybe_abort_after_write_metrics`, MaxText's own place to end a broken run.
"""

import contextlib
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from moeconv_train.loss_scaling.optimizer import LossScaleState, with_loss_scale
from moeconv_train.loss_scaling.settings import LossScaleSettings, Mode, check_config

from moeconv.errors import ConfigError, MoeconvError, UnsupportedError

# The calls of the replaced functions, in MaxText's words, and what these functions take.
_CALLS = {
    "train_step": (
        "gradient_accumulation_loss_and_grad(\n        loss_fn,",
        "loss_fn(local_model, config, data, None, None, is_train=True)",
        "state.apply_gradients(grads)",
        '"scalar": scalar_metrics',
    ),
    "train_loop": ("train_step,\n      eval_step,",),
    "create_training_optimizer": ("tx = optimizers.get_optimizer(config, ",),
    "write_metrics": ("self._maybe_abort_after_write_metrics(metrics)",),
}
_SIGNATURES = {
    "loss_fn": "(model, config, data, dropout_rng, params, sparsity_state=None, is_train=True)",
    "train_step": "(model, config, state_mesh_shardings, params_shardings, state, data,"
    " dropout_rng=None)",
    "get_optimizer": "(config, learning_rate_schedule, model=None, mesh=None)",
    "_maybe_abort_after_write_metrics": "(self, metrics)",
}


@contextlib.contextmanager
def install(settings: LossScaleSettings) -> Iterator[None]:
    """While this is open, MaxText trains with loss scaling where `settings` say so for its dtype.

    It must be open when MaxText builds the optimizer and when it traces the step: keep it open
    around all of a run, or of an ahead-of-time compile.
    """
    from maxtext.common.metric_logger import MetricLogger
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train

    _check_maxtext()
    abort = MetricLogger._maybe_abort_after_write_metrics
    replacements = (
        (train, "train_step", _scaled_train_step(train, settings)),
        (optimizers, "get_optimizer", _scaled_optimizer(optimizers.get_optimizer, settings)),
        (MetricLogger, abort.__name__, _give_up(abort, settings.patience)),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(_replaced(owner, name, value))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Sets an attribute, and puts the old one back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _check_maxtext() -> None:
    """Refuses a MaxText whose training loop is not the one that this module fits into."""
    from maxtext.common.metric_logger import MetricLogger
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
    from maxtext.utils import train_utils

    found = {
        "loss_fn": train.loss_fn,
        "train_step": train.train_step,
        "train_loop": train.train_loop,
        "get_optimizer": optimizers.get_optimizer,
        "create_training_optimizer": train_utils.create_training_optimizer,
        "write_metrics": MetricLogger.write_metrics,
        "_maybe_abort_after_write_metrics": MetricLogger._maybe_abort_after_write_metrics,
    }
    if hasattr(train.train_step, "__wrapped__"):
        raise MoeconvError("MaxText's train_step is replaced already: scaling is installed twice.")
    # Other patches of ours wrap the logger and the loop; what they wrap is what counts.
    found = {name: inspect.unwrap(function) for name, function in found.items()}
    wrong = {
        name for name, text in _SIGNATURES.items() if str(inspect.signature(found[name])) != text
    } | {
        name
        for name, texts in _CALLS.items()
        if not all(text in inspect.getsource(found[name]) for text in texts)
    }
    if wrong:
        raise UnsupportedError(
            f"MaxText {importlib.metadata.version('maxtext')} differs from 0.2.5 in "
            f"{', '.join(sorted(wrong))}: loss scaling does not fit; install maxtext==0.2.5."
        )


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
    from etils import epath

    if not (config.enable_checkpointing and config.checkpoint_dir):
        return
    directory = epath.Path(config.checkpoint_dir)
    steps = directory.iterdir() if directory.is_dir() else ()
    for step in steps:
        metadata = step / "items" / "_METADATA"
        if not (step.name.isdecimal() and metadata.exists()):
            continue
        has = "'loss_scale'" in metadata.read_text()
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
        loss_fn = _scaled_loss_fn(train.loss_fn, before.loss_scale)
        with _replaced(train, "loss_fn", loss_fn):
            state, metrics = stock(*arguments, state, data, dropout_rng)
        if not loss_fn.calls:
            raise UnsupportedError("MaxText's train_step did not call loss_fn: nothing is scaled.")
        after = _scaling(state)
        metrics["scalar"] |= {
            "learning/loss_scale": before.loss_scale,
            "learning/skipped_steps": after.skipped_steps,
            "learning/overflow": after.skipped_steps - before.skipped_steps,
        }
        return state, metrics

    return train_step


def _scaled_loss_fn(stock: Callable[..., Any], scale: Any) -> Any:
    """`loss_fn`: the same values, cotangents times `scale` inside and true at the parameters."""
    import jax
    from flax import nnx

    scale_cotangent = _cotangent_scaler()

    @functools.wraps(stock)  # nnx.value_and_grad reads the signature
    def loss_fn(model: Any, *args: Any, **kwargs: Any) -> Any:
        loss_fn.calls += 1  # type: ignore[attr-defined]
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: scale_cotangent(x, 1 / scale), parameters))
        try:
            loss, aux = stock(model, *args, **kwargs)
        finally:
            nnx.update(model, parameters)
        return scale_cotangent(loss, scale), aux

    loss_fn.calls = 0  # type: ignore[attr-defined]
    return loss_fn


@functools.cache
def _cotangent_scaler() -> Callable[[Any, Any], Any]:
    """`f(x, s)`: x, but its cotangent is multiplied by s."""
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def scale_cotangent(x: Any, scale: Any) -> Any:
        return x

    def forward(x: Any, scale: Any) -> tuple[Any, Any]:
        return x, scale

    def backward(scale: Any, cotangent: Any) -> tuple[Any, Any]:
        return (cotangent * scale).astype(cotangent.dtype), jnp.zeros_like(scale)

    scale_cotangent.defvjp(forward, backward)
    return scale_cotangent


def _scaling(state: Any) -> LossScaleState:
    """The loss scale's state inside of MaxText's train state."""
    from flax import nnx

    found = {
        path[-1]: variable.get_value()
        for path, variable in nnx.to_flat_state(state)
        if path[0] == "optimizer" and path[-1] in LossScaleState._fields
    }
    if len(found) != len(LossScaleState._fields):
        raise MoeconvError(
            "The optimizer was built before loss scaling was installed; install it around the run."
        )
    return LossScaleState(**found)


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
                f"The gradients of {skips} steps in a row were not finite, in the end at a loss "
                f"scale of {float(scalars['learning/loss_scale']):g}: FP16 itself overflows in "
                "this model (see docs/fp16.md), so train with dtype=float32 or bfloat16."
            )

    return check
