"""Whether the disk holds the checkpoints that the run keeps, and the one that is being saved."""

import shutil
from pathlib import Path

from moeconv_train.preflight.case import Case
from moeconv_train.preflight.report import Finding

from moeconv.convert.sizes import format_size


def check_disk(case: Case, state_bytes: int | None) -> Finding:
    """Compares the free space with the checkpoints that are still to come.

    A checkpoint is deleted only after the next one is whole, so one more than are kept must fit.
    Those that a resumed run has already need no new space. `state_bytes` are the state's own;
    compression makes a checkpoint at most smaller.
    """
    output = case["base_output_directory"]
    if not case["enable_checkpointing"]:
        return Finding(check="disk", status="note", message="The run saves no checkpoints.")
    if not output or "://" in str(output):
        where = output or "no base_output_directory"
        return Finding(check="disk", status="skipped", message=f"Not a local disk: {where}.")
    if state_bytes is None:
        return Finding(check="disk", status="skipped", message="The state's size is not known.")
    keep = case["max_num_checkpoints_to_keep"]
    if keep is None:
        message = "max_num_checkpoints_to_keep=None keeps all checkpoints, which no disk can hold."
        return Finding(check="disk", status="refused", message=message)
    run = Path(output, str(case["run_name"] or ""))
    there = _checkpoints(run / "checkpoints")
    needed = state_bytes * max(keep + 1 - there, 1)
    free = shutil.disk_usage(_existing(run)).free
    sentence = (
        f"{output} has {format_size(free)} free; {keep} checkpoints of {format_size(state_bytes)} "
        f"and one being saved{f', {there} there already,' if there else ''} need "
        f"{format_size(needed)}"
    )
    data = case.settings.data_bytes
    if data is None:
        sentence += ", the data that are still to be prepared not counted"
    elif data:
        sentence += f", and the data that are still to be prepared about {format_size(data)}"
    fix = "free space there, or choose another base_output_directory"
    if needed > free:
        return Finding(check="disk", status="refused", message=f"{sentence}: {fix}.")
    if needed + (data or 0) > free:  # which is only about right
        return Finding(check="disk", status="warn", message=f"{sentence}: {fix}.")
    return Finding(check="disk", status="ok", message=f"{sentence}.")


def _checkpoints(directory: Path) -> int:
    if not directory.is_dir():
        return 0
    return sum(step.name.isdigit() for step in directory.iterdir())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
