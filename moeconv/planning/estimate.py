"""What a plan costs: bytes read and written, disk, and memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeconv.errors import MemoryLimitError
from moeconv.planning.output import Output
from moeconv.planning.slabs import BLOCK_BYTES, MIB
from moeconv.planning.units import Assembly, Unit
from moeconv.sizes import format_size

# Source block, transposed block, one temporary of a value op: what a worker holds besides its unit.
WORKER_BYTES = 4 * BLOCK_BYTES
# numpy, tensorstore, pydantic, rich: the interpreter before any work, measured and rounded up.
IMPORT_BYTES = 128 * MIB
# config.json, tokenizer, manifest and journal.
_SMALL_FILES = 96 * MIB


def unit_cost(unit: Unit) -> int:
    """Peak bytes of one unit: decoded, and compressed (never larger) while it is decoded.

    Its companions count with it, and so do the zeros that a padded axis brings with its last block.
    """
    return 2 * unit.held_bytes + max(WORKER_BYTES, unit.work_bytes)


@dataclass(frozen=True)
class Estimate:
    """What carrying out a plan takes.

    Attributes:
        read_bytes: Bytes of the arrays, decoded; each is read once.
        write_bytes: Bytes of the files that hold values.
        scratch_bytes: Bytes of scratch files that may exist at the same time.
        memory_floor: The least memory with which it can be done, one unit at a time.
        largest: The unit that needs most of it.
    """

    read_bytes: int
    write_bytes: int
    scratch_bytes: int
    memory_floor: int
    largest: Unit

    @classmethod
    def of(
        cls, units: Sequence[Unit], assemblies: Sequence[Assembly], output: Output
    ) -> "Estimate":
        """Adds up the parts of a plan."""
        largest = max(units, key=unit_cost)
        return cls(
            read_bytes=sum(unit.nbytes for unit in units),
            write_bytes=output.nbytes,
            scratch_bytes=sum(sorted(each.size for each in assemblies)[-2:]),
            memory_floor=IMPORT_BYTES + unit_cost(largest),
            largest=largest,
        )

    @property
    def disk_bytes(self) -> int:
        """Free space needed: the files, scratch, and room for configs and tokenizer."""
        return self.write_bytes + self.scratch_bytes + _SMALL_FILES

    def memory_budget(self, limit: int, jobs: int) -> int:
        """Memory the engine will keep within.

        It takes what one unit at a time needs, plus something for every job, and never more than
        the limit: on a small machine memory matters more than the last few percent of speed.

        Raises:
            MemoryLimitError: The limit is below the floor.
        """
        floor = self.memory_floor
        if limit < floor:
            work = self.largest.work_bytes
            moved = f", and then {format_size(work)} at once are moved" if work else ""
            raise MemoryLimitError(
                f"--max-memory {format_size(limit)} is below the {format_size(floor)} that this "
                f"checkpoint needs: {self.largest.array.name} is stored in chunks of "
                f"{format_size(self.largest.decoded_bytes)}, and a chunk is decoded whole{moved}; "
                f"give --max-memory {math.ceil(floor / MIB)}MiB or more"
            )
        return min(limit, max(int(1.1 * floor), jobs * 384 * MIB))
