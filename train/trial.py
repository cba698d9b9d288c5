"""A run's first session tries its cheaper step against MaxText's own, on its own devices and rows.

Three steps from the same weights and rows: in fp32, as the truth; in the run's dtype as MaxText
computes it; and with the run's patches. The patched step is kept if its gradient is as near to the
truth as MaxText's, it skips the same steps, and it is faster. `trial.json` in the run's folder has
all of it, and the sessions that follow go by it.
"""

import contextlib
import gc
import itertools
import math
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from moeconv_train import start, trainer
from moeconv_train.explain import explained
from moeconv_train.logs.console import logged
from moeconv_train.plan import Plan
from moeconv_train.preflight import patches
from moeconv_train.preflight.config import said
from moeconv_train.preflight.target import environment
from moeconv_train.run_dir import saved_step
from moeconv_train.trial_file import FILE, Side, Trial, chosen, judge

from moeconv.errors import MoeconvError, TrainingError

LOG = "trial.log"
STEPS = 20

# Of the run nothing but its model, data and step.
_ALONE = {
    "enable_checkpointing": False,
    "save_checkpoint_on_completion": False,
    "async_checkpointing": False,
    "enable_wandb": False,
}
# Without clipping Adam's first moment is the gradient; one row a device leaves room for fp32.
_GRADIENT = {
    "per_device_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping_threshold": 0.0,
}
_MOMENT = re.compile(r"optimizer\.opt_state\.(?:0\.)?mu\.(.+)")
_HALVINGS = 30


def begin(
    plan: Plan, words: Sequence[str], note: Callable[[str], None], *, steps: int = STEPS
) -> Trial | None:
    """Tries the run's patches and writes `trial.json`; None if it has none, or has begun before.

    Args:
        plan: With its data prepared.
        words: The command line that it is of.
        note: Takes sentences for people.
        steps: Timed of each.

    Raises:
        MoeconvError: There is nothing to compare with; nothing is chosen.
    """
    patched = {name: on for name, on in plan.run.patches.items() if on and name != "fp16_head"}
    run = plan.run_dir
    if not patched or chosen(run) is not None or saved_step(run) is not None:
        note(f"trial: nothing to try: {run} has no patches, or has been tried, or has begun")
        return None
    run.mkdir(parents=True, exist_ok=True)
    log = run / LOG
    note(f"trial: {', '.join(patched)} against MaxText's own step; its output is in {log}")
    with tempfile.TemporaryDirectory() as scratch, logged(log), explained(log, run):
        alone = {**_ALONE, "base_output_directory": scratch}
        if plan.feed.kind == "prepared":
            alone["run.data.directory"] = plan.feed.directory
        stock = alone | {f"run.patches.{name}": False for name in patched}
        truth, _ = gradient(_over(words, stock | _GRADIENT | {"dtype": "float32"}))
        theirs = _side(words, stock, truth, steps)
        import jax  # not before its environment is set

        device = jax.devices()[0].device_kind
        ours = alone | {f"run.patches.{name}": True for name in patched}
        try:
            with explained(log, run):
                trial = judge(patched, theirs, _side(words, ours, truth, steps), device)
        except MoeconvError as error:
            reason = f"MaxText's own step is kept: the patched one cannot be run ({error})"
            off = dict.fromkeys(patched, False)
            trial = Trial(chosen=off, reason=reason, device=device, stock=theirs)
    trial.write(run)
    note(f"trial: {trial.reason}; the numbers are in {run / FILE}")
    return trial


def _over(words: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """A command line with other values of these keys."""
    kept = [word for word in words if word.partition("=")[0] not in keys]
    return [*kept, *(f"{key}={said(value)}" for key, value in keys.items())]


def _side(
    words: Sequence[str], keys: Mapping[str, Any], truth: Mapping[str, Any], steps: int
) -> Side:
    """What is measured of the step that these keys make."""
    found, skipped = gradient(_over(words, {**keys, **_GRADIENT}))
    distances = {name: _distance({name: found[name]}, truth) for name in found}
    whole = _distance(found, truth)
    del found
    seconds, overflows = timed(_over(words, keys), steps)
    return Side(
        skipped=skipped, distance=whole, distances=distances, seconds=seconds, overflows=overflows
    )


def _distance(found: Mapping[str, Any], truth: Mapping[str, Any]) -> float | None:
    """Of these parameters' gradients together from the truth, relative to its norm."""
    import numpy as np

    def norm(arrays: Iterable[Any]) -> float:
        return math.sqrt(sum(float(np.sum(np.square(each), dtype="f8")) for each in arrays))

    apart = norm(found[name] - truth[name] for name in found)
    whole = norm(truth[name] for name in found)
    distance = apart / whole if whole else apart and math.inf
    return distance if math.isfinite(distance) else None


def gradient(words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """By parameter, and how many steps the loss scaler left out before it did one.

    Raises:
        MoeconvError: No loss scale fits, or the optimizer is not Adam.
    """
    with contextlib.closing(_steps(words)) as steps:
        skipped, (state, scalars, config) = 0, next(steps)
        while scalars.get("learning/overflow", 0):
            skipped, (state, scalars, config) = skipped + 1, next(steps)
            if skipped == _HALVINGS:
                raise TrainingError("no loss scale is small enough for this gradient")
    import numpy as np
    from flax import nnx  # and with it jax, not before its environment is set

    found = {}
    for path, variable in nnx.to_flat_state(state):
        if moment := _MOMENT.fullmatch(".".join(map(str, path))):
            found[moment[1]] = np.asarray(variable.get_value()) / (1 - config.adam_b1)
    if not found:
        raise TrainingError(f"opt_type={config.opt_type}: a trial reads gradients in Adam's moment")
    return found, skipped


def timed(words: Sequence[str], count: int) -> tuple[list[float], int]:
    """Seconds of each of `count` steps, and how many of them the loss scaler left out."""
    ends, overflows = [], 0
    with contextlib.closing(_steps(words)) as steps:
        for _, scalars, _ in itertools.islice(steps, count + 1):  # the first warms up
            float(scalars["learning/loss"])  # waits for the step
            ends.append(time.perf_counter())
            overflows += int(scalars.get("learning/overflow", 0))
    return [end - begun for begun, end in itertools.pairwise(ends)], overflows


def _steps(words: Sequence[str]) -> Generator[tuple[Any, dict[str, Any], Any]]:
    """The same batch over and over: the state after each step, its metrics, MaxText's config."""
    gc.collect()  # the state of the steps before: one at a time is on the devices
    plan = start.plan_run(words, network=False).plan
    # JAX reads its part of memory once, for the first plan, whose step needs the most.
    with environment(plan), patches.trainer(**plan.patches), plan.feed.reading():
        config, recorder = trainer.initialize(plan)
        import jax
        from flax import nnx
        from flax.core.spmd import logical_axis_rules
        from maxtext.trainers.pre_train import train
        from maxtext.utils import sharding, train_utils

        # As `train_loop` does.
        _, _, shardings, _, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(
            config, recorder
        )
        graph, state = nnx.split(state)
        params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
        functions = (train.train_step, train.eval_step)
        step, _ = train_utils.jit_train_and_eval_step(
            config, graph, mesh, state, shardings, *functions, None, params
        )
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            batch = loader.load_next_batch()
            while True:
                state, metrics = step(state, batch)
                yield state, metrics["scalar"], config
