"""The journal of a conversion under way: what is safely on disk, so that `--resume` can go on.

One JSON line each, appended after the data it speaks of was synced: first the plan's digest, then
finished units with the digests of their chunks, and arrays whose parked pieces were put together.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


class Journal:
    """An append-only file in the staging directory."""

    def __init__(self, folder: Path, plan_digest: str, *, resume: bool) -> None:
        """Opens it; with `resume` takes over what an earlier process wrote for the same plan.

        Raises:
            ValueError: There is a journal, but of another plan.
        """
        self.done: dict[int, dict[tuple[int, ...], str]] = {}
        self.zeros: dict[int, list[tuple[int, ...]]] = {}
        self.settled: set[str] = set()
        self.resumed = False
        path = folder / NAME
        if resume and path.exists():
            self._read(path, plan_digest)
        self._file = path.open("a" if self.resumed else "w", encoding="utf-8")
        if not self.resumed:
            self._append({"plan": plan_digest})

    def _read(self, path: Path, plan_digest: str) -> None:
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the last line of a process that died while writing it
        if not lines:
            return
        if lines[0].get("plan") != plan_digest:
            raise ValueError("the journal is of another plan")
        for entry in lines[1:]:
            if "unit" in entry:
                chunks = {tuple(position): digest for position, digest in entry["chunks"]}
                self.done[entry["unit"]] = chunks
                self.zeros[entry["unit"]] = [tuple(position) for position in entry.get("zeros", ())]
            elif "settled" in entry:
                self.settled.add(entry["settled"])
        self.resumed = True
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
        path.write_text(text, encoding="utf-8")

    def unit(
        self, number: int, chunks: dict[tuple[int, ...], str], zeros: Sequence[tuple[int, ...]]
    ) -> None:
        """Records a unit whose bytes are synced: its chunks, and which of them hold only zeros."""
        entry = {"unit": number, "chunks": [[list(p), d] for p, d in chunks.items()]}
        self._append({**entry, "zeros": [list(p) for p in zeros]})

    def settle(self, array: str) -> None:
        """Records an array whose parked pieces are in their places, synced."""
        self._append({"settled": array})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
