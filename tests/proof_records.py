"""Proof records: what was proven, when, and the SHA-256 of everything that it depends on.

`make prove` writes one file for each proof into tests/proofs/ (proof_plugin.py). A record is
current while its digest is that of the tree: the Python files that its tests import, at any depth,
start, or name in a string, without comments and docstrings; what lies in their packages besides;
the pins; and the `inputs` of the proof's marker.
"""

import hashlib
from collections.abc import Collection
from datetime import date
from pathlib import Path

from proof_tree import Tree
from pydantic import BaseModel, ConfigDict

RECORDS = "tests/proofs"
# What `make test-slow` spends on proofs whose record is current.
BUDGET_SECONDS = 300.0
_PINS = "requirements/dev.txt"


class Claim(BaseModel):
    """What a proof consists of, as its marker says.

    `inputs` are globs of files that no import shows; `without` are globs of modules that are named
    and never imported by its tests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tests: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def digest(self, tree: Tree) -> str:
        """The SHA-256 of everything it depends on."""
        modules = sorted({test.partition("::")[0] for test in self.tests})
        return tree.digest([*modules, *self.inputs, _PINS], self.without)


class Record(Claim):
    """A proof that was run whole, and passed."""

    date: date
    cpu_seconds: float  # of its processes: what it takes wherever others use the machine too
    cores: int
    python: str
    sha256: str

    @property
    def claim(self) -> Claim:
        """What was claimed when it was run."""
        return Claim(**{name: getattr(self, name) for name in Claim.model_fields})

    def is_current(self, tree: Tree) -> bool:
        """True if all that it depends on is as it was."""
        try:
            return self.digest(tree) == self.sha256
        except FileNotFoundError:
            return False

    def write(self, root: Path) -> None:
        """Replaces the proof's file in a checkout."""
        path = root / RECORDS / f"{self.name.replace(' ', '_')}.json"
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_records(root: Path) -> dict[str, Record]:
    """All records of a checkout, by the name of the proof."""
    paths = sorted((root / RECORDS).glob("*.json"))
    records = [Record.model_validate_json(path.read_bytes()) for path in paths]
    return {record.name: record for record in records}


def sample(records: Collection[Record], day: date, budget: float = BUDGET_SECONDS) -> set[str]:
    """The proofs that are run again on that day though their record is current.

    A part that changes each day, so that every proof has its turn; then, as far as the budget
    goes, those that were renewed last.
    """
    if not records:
        return set()
    parts = _parts(records, budget / 2)
    chosen = parts[day.toordinal() % len(parts)]
    for record in sorted(records, key=lambda r: (-r.date.toordinal(), _draw(day, r.name))):
        if record not in chosen and sum(r.cpu_seconds for r in [*chosen, record]) <= budget:
            chosen.append(record)
    return {record.name for record in chosen}


def _parts(records: Collection[Record], limit: float) -> list[list[Record]]:
    """All records in parts of at most so many seconds; a longer one is alone."""
    parts: list[list[Record]] = []
    for record in sorted(records, key=lambda r: (-r.cpu_seconds, r.name)):
        for part in parts:
            if sum(r.cpu_seconds for r in [*part, record]) <= limit:
                part.append(record)
                break
        else:
            parts.append([record])
    return parts


def _draw(day: date, name: str) -> str:
    return hashlib.sha256(f"{day}{name}".encode()).hexdigest()
