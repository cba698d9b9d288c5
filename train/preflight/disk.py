"""Whether the disk holds the checkpoints that the run keeps, and the one that is being saved."""

import shutil
from typing import TYPE_CHECKING

from moeconv_train.preflight.report import Finding, Status

from moeconv.convert.sizes import format_size
from moeconv.errors import OutputError

if TYPE_CHECKING:
    from moeconv_train.plan import Plan


def check_disk(plan: "Plan") -> Finding:
    """Compares the free space with the checkpoints that are still to come.

    A checkpoint is deleted only after the next one is whole, so one more than are kept must fit.
    Those that a resumed run has already need no new space; compression makes one at most smaller.
    """
    if not plan.config["enable_checkpointing"]:
        return Finding(check="disk", status="note", message="The run saves no checkpoints.")
    if plan.size is None:
        message = f"The size of a decoder_block={plan.config['decoder_block']} is not known."
        return Finding(check="disk", status="skipped", message=message)
    state_bytes, keep = plan.size.state_bytes, int(plan.config["max_num_checkpoints_to_keep"])
    there = sum(step.name.isdigit() for step in plan.run_dir.glob("checkpoints/*"))
    needed = state_bytes * max(keep + 1 - there, 1)
    place = plan.run_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    message = (
        f"{plan.config['base_output_directory']} has {format_size(free)} free; {keep} checkpoints "
        f"of {format_size(state_bytes)} and one being saved"
        f"{f', {there} there already,' if there else ''} need {format_size(needed)}"
    )
    if plan.feed.kind == "prepared" and plan.feed.dataset is None:
        message += " (and data that are still to be prepared some, which are not counted)"
    status: Status = "ok"
    if needed > free:
        status = "refused"
        message += ": free space there, or choose another base_output_directory"
    return Finding(
        check="disk", status=status, message=f"{message}.", exit_code=OutputError.exit_code
    )
