"""A run's first session tries its cheaper step against MaxText's own, on its own devices and rows.

Three steps from the same weights and rows: in fp32, as the truth; in the run's dtype as MaxText
computes it; and with the run's patches. The patched step is kept if its gradient is as near to the
truth as MaxText's, it skips the same steps, and it is faster. `trial.json` in the run's folder has
all of it, and the sessions that follow go by it.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeconv_train.plan import Plan
from moeconv_train.run_dir import saved_step
from moeconv_train.trial_file import FILE, Gradient, Side, Trial, chosen
from moeconv_train.trial_worker import ANSWER, REQUEST

from moeconv.errors import TrainingError

LOG = "trial.log"
STEPS = 20
TRUTH, STOCK, PATCHED = "fp32", "stock", "patched"
# How much farther from the truth than MaxText's a gradient may be: the whole one, and that of each
# parameter, where a few near ties of the router weigh more. Nothing nearer than fp16's own rounding
# is too far. A distance bounds the angle and the norm as well.
WHOLE, EACH, ROUNDING = 1.25, 2.0, 2.0**-10

# Of the run nothing but its model, data and step.
_ALONE = {
    "enable_checkpointing": "false",
    "save_checkpoint_on_completion": "false",
    "async_checkpointing": "false",
    "enable_wandb": "false",
}
# Without clipping Adam's first moment is the gradient; one row a device leaves room for fp32.
_GRADIENT = {
    "per_device_batch_size": "1",
    "gradient_accumulation_steps": "1",
    "gradient_clipping_threshold": "0.0",
}
_CHUNK = 2**22

Launch = Callable[[Mapping[str, Any], Path, Path], dict[str, Any]]


def begin(
    plan: Plan,
    words: Sequence[str],
    note: Callable[[str], None],
    *,
    launch: Launch | None = None,
    steps: int = STEPS,
) -> Trial | None:
    """Tries the run's patches and writes `trial.json`; None if it has none, or has begun before.

    Args:
        plan: With its data prepared.
        words: The command line that it is of.
        note: Takes sentences for people.
        launch: Runs a request in its folder, with a log; by default in a process of its own.
        steps: Timed of each.

    Raises:
        TrainingError: There is nothing to compare with; nothing is chosen.
    """
    patched = {name: on for name, on in plan.run.patches.items() if on and name != "fp16_head"}
    run = plan.run_dir
    if not patched or chosen(run) is not None or saved_step(run) is not None:
        note(f"trial: nothing to try: {run} has no patches, or has been tried, or has begun")
        return None
    run.mkdir(parents=True, exist_ok=True)
    note(f"trial: {', '.join(patched)} against MaxText's own step; its output is in {run / LOG}")
    off = dict.fromkeys(patched, False)
    sides = {TRUTH: ({"dtype": "float32"}, off), STOCK: ({}, off), PATCHED: ({}, patched)}
    told: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (keys, patches) in sides.items():
            folder = Path(scratch, name)
            folder.mkdir()
            given = {**_ALONE, **keys, "base_output_directory": str(folder / "runs")}
            if plan.feed.kind == "prepared":
                given["run.data.directory"] = str(plan.feed.directory)
            request = {
                "gradient": _over(words, {**given, **_GRADIENT}),
                "timed": _over(words, given),
                "patches": patches,
                "steps": 0 if name == TRUTH else steps,
            }
            try:
                told[name] = (launch or _process)(request, folder, run / LOG)
            except TrainingError as error:
                if name != PATCHED:
                    raise TrainingError(f"{run}: {name} cannot be tried: {error}") from None
                reason = f"MaxText's own step is kept: the patched one cannot be run ({error})"
                trial = Trial(chosen=off, reason=reason, device=told[STOCK]["device"], sides={})
                return _done(trial, run, note)
        names = told[TRUTH]["parameters"]
        gradients = {side: _gradients(Path(scratch), side, names) for side in (STOCK, PATCHED)}
    return _done(judge(patched, told, gradients), run, note)


def _done(trial: Trial, run: Path, note: Callable[[str], None]) -> Trial:
    """Writes it and says so."""
    trial.write(run)
    note(f"trial: {trial.reason}; the numbers are in {run / FILE}")
    return trial


def judge(
    patched: Mapping[str, bool],
    told: Mapping[str, Mapping[str, Any]],
    gradients: Mapping[str, Mapping[str, Gradient]],
) -> Trial:
    """The verdict on what each side told."""
    sides = {
        name: Side(
            seconds=side["seconds"],
            losses=[loss if math.isfinite(loss) else None for loss in side["losses"]],
            skipped=side["skipped"],
            overflows=side["overflows"],
            gradients=dict(gradients.get(name, {})),
            distance=_whole(gradients.get(name, {})),
        )
        for name, side in told.items()
    }
    stock, ours = sides[STOCK], sides[PATCHED]
    far = [
        name
        for name, gradient in ours.gradients.items()
        if not _near(gradient.distance, stock.gradients[name].distance, EACH)
    ]
    times = " s a step against ".join(
        f"{statistics.median(side.seconds):.3f}" for side in (ours, stock)
    )
    kept = "MaxText's own step is"
    if far or not _near(ours.distance, stock.distance, WHOLE):
        reason = f"the patched gradient is too far from fp32's ({', '.join(far[:3]) or 'in all'})"
    elif (ours.skipped, ours.overflows) != (stock.skipped, stock.overflows):
        reason = "the patched step skips others"
    elif statistics.median(ours.seconds) >= statistics.median(stock.seconds):
        reason = f"the patched one is not faster ({times} s)"
    else:
        kept, reason = "the patches are", f"{times} s, and the gradient is as near to fp32's"
    return Trial(
        chosen=dict.fromkeys(patched, kept == "the patches are"),
        reason=f"{kept} kept: {reason}",
        device=told[PATCHED]["device"],
        sides=sides,
    )


def _whole(gradients: Mapping[str, Gradient]) -> float | None:
    """The distance of all parameters together."""
    parts = [each.distance for each in gradients.values()]
    norm = math.hypot(*(each.norm for each in gradients.values()))
    if None in parts or not norm:
        return None
    return math.hypot(*((e.distance or 0) * e.norm for e in gradients.values())) / norm


def _near(ours: float | None, stock: float | None, factor: float) -> bool:
    """Whether our distance from the truth is hardly more than stock's."""
    return ours is not None and ours <= max(factor * (stock or 0.0), ROUNDING)


def _over(words: Sequence[str], keys: Mapping[str, str]) -> list[str]:
    """A command line with other values of these keys."""
    kept = [word for word in words if word.partition("=")[0] not in keys]
    return [*kept, *(f"{key}={value}" for key, value in keys.items())]


def _gradients(scratch: Path, side: str, names: Sequence[str]) -> dict[str, Gradient]:
    """One side's against the truth, by parameter."""
    import numpy as np

    found = {}
    for index, name in enumerate(names):
        ours, truth = (
            np.load(scratch / each / f"{index}.npy", mmap_mode="r").reshape(-1)
            for each in (side, TRUTH)
        )
        square, norm, product = _dot(ours, ours), math.sqrt(_dot(truth, truth)), _dot(ours, truth)
        apart = math.sqrt(max(0.0, square - 2 * product + norm**2))
        found[name] = Gradient(
            norm=norm,
            distance=_ratio(apart, norm),
            cosine=_ratio(product, math.sqrt(square) * norm),
        )
    return found


def _dot(left: Any, right: Any) -> float:
    """In float64, in pieces that fit any memory."""
    return math.fsum(
        float(left[at : at + _CHUNK].astype("f8") @ right[at : at + _CHUNK].astype("f8"))
        for at in range(0, left.size, _CHUNK)
    )


def _ratio(part: float, whole: float) -> float | None:
    """Nothing of nothing is nothing."""
    found = part / whole if whole else (0.0 if part == 0 else math.nan)
    return found if math.isfinite(found) else None


def _process(request: Mapping[str, Any], folder: Path, log: Path) -> dict[str, Any]:
    """A side in a process of its own, so that one state at a time is on the devices.

    Raises:
        TrainingError: It failed.
    """
    (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, "-m", "moeconv_train.trial_worker", str(folder)]
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if code:
        raise TrainingError(f"its process ended with {code}; {log} says why")
    told: dict[str, Any] = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    return told
