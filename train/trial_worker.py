"""One side of a trial, in a process of its own: MaxText's train step on the run's first batch.

python -m moeconv_train.trial_worker FOLDER     a request in FOLDER, the answer and a gradient too
"""

import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import MoeconvError

REQUEST, ANSWER = "request.json", "answer.json"
_MOMENT = re.compile(r"optimizer\.opt_state\.(?:0\.)?mu\.(.+)")
_HALVINGS = 30


def measure(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Leaves a gradient in the folder, as `<index>.npy`, then times steps.

    Args:
        request: `gradient` and `timed`, the words of two command lines of `moeconv train`; the
            `patches` of both; how many `steps` to time.
        folder: Of this side.

    Returns:
        The `parameters` of the gradient; how many steps were `skipped` before a loss scale fitted;
        `seconds` and `losses` of the timed steps, and how many `overflows` they had; the `device`.
    """
    import jax

    parameters, skipped = _gradient(request, folder)
    ends, losses, overflows = [], [], 0
    with contextlib.closing(_steps(request, "timed")) as steps:
        # The first warms up; none at all of the side that is not timed.
        for _ in range(request["steps"] and request["steps"] + 1):
            _, scalars, _ = next(steps)
            losses.append(float(scalars["learning/loss"]))  # waits for the step
            ends.append(time.perf_counter())
            overflows += int(scalars.get("learning/overflow", 0))
    return {
        "parameters": parameters,
        "skipped": skipped,
        "seconds": [end - begun for begun, end in itertools.pairwise(ends)],
        "losses": losses,
        "overflows": overflows,
        "device": jax.devices()[0].device_kind,
    }


def _gradient(request: Mapping[str, Any], folder: Path) -> tuple[list[str], int]:
    """Names of its parameters, and how many steps the loss scaler left out before it did one."""
    import jax
    import numpy as np
    from flax import nnx

    with contextlib.closing(_steps(request, "gradient")) as steps:
        skipped, (state, scalars, config) = 0, next(steps)
        while scalars.get("learning/overflow", 0):
            skipped, (state, scalars, config) = skipped + 1, next(steps)
            if skipped == _HALVINGS:
                raise MoeconvError("no loss scale is small enough for this gradient")
    names: list[str] = []
    for path, variable in nnx.to_flat_state(state):
        if found := _MOMENT.fullmatch(".".join(map(str, path))):
            moment = np.asarray(jax.device_get(variable.get_value()))
            np.save(folder / f"{len(names)}.npy", moment / (1 - config.adam_b1))
            names.append(found[1])
    if not names:
        raise MoeconvError(f"opt_type={config.opt_type}: a trial reads gradients in Adam's moment")
    return names, skipped


def _steps(request: Mapping[str, Any], which: str) -> Generator[tuple[Any, dict[str, Any], Any]]:
    """The same batch over and over: the state after each step, its metrics, MaxText's config."""
    from moeconv_train import start, trainer
    from moeconv_train.preflight import patches
    from moeconv_train.preflight.target import environment

    plan = start.plan_run(request[which], network=False).plan
    given = {**plan.patches, **request["patches"]}
    with environment(plan), patches.trainer(**given), plan.feed.reading():
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


def main() -> None:
    """One request."""
    folder = Path(sys.argv[1])
    told = measure(json.loads((folder / REQUEST).read_text(encoding="utf-8")), folder)
    (folder / ANSWER).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
