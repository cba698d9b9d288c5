"""What a preparation keeps in OUT/.prepare while it works: request, lock, receipts.

A shard counts only with the receipt of its chunk, which is written once the shard is on disk.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from moeconv_train.data import records
from moeconv_train.data.manifest import NAME, SPLITS, TOKENIZER, Request
from moeconv_train.data.work import Job, Receipt
from pydantic import ValidationError

from moeconv.errors import OutputError

JOURNAL = ".prepare"
REQUEST = "request.json"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds `out` for this process.

    Raises:
        OutputError: Another process holds it.
    """
    journal = out / JOURNAL
    journal.mkdir(exist_ok=True)
    with (journal / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{out}: another process is preparing data there") from None
        try:
            yield
        finally:
            if (out / NAME).exists() or not (journal / REQUEST).exists():
                shutil.rmtree(journal, ignore_errors=True)


def interrupted(out: Path) -> Request | None:
    """What an unfinished preparation was asked for."""
    try:
        return Request.model_validate_json((out / JOURNAL / REQUEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def begin(out: Path, request: Request) -> bool:
    """Claims `out` for this request; True if part of the work is there."""
    journal = out / JOURNAL
    path = journal / REQUEST
    if path.exists():
        if interrupted(out) != request:
            raise OutputError(
                f"{out}: holds part of a preparation of something else (another source, tokenizer "
                "or option); choose another --out, or pass --overwrite"
            )
        for partial in out.glob(".*.partial"):
            partial.unlink()
        return True
    if strangers := sorted(file.name for file in out.iterdir() if file != journal):
        raise OutputError(
            f"{out}: is not empty (it holds {strangers[0]}); choose a new or empty folder as --out"
        )
    records.write_bytes(path, request.model_dump_json(indent=1).encode())
    return False


def finished(job: Job, file: int) -> list[Receipt] | None:
    """The receipts of a file of which every chunk is done."""
    marker = job.receipts / f"{file:04d}.done"
    if not marker.exists():
        return None
    kept = [receipt(job, f"{file:04d}-{i:05d}") for i in range(int(marker.read_text()))]
    whole = [entry for entry in kept if entry is not None]
    return whole if len(whole) == len(kept) else None


def receipt(job: Job, name: str) -> Receipt | None:
    """A chunk's receipt, if every byte of its shards is still what it says."""
    path = job.receipts / f"{name}.json"
    try:
        found = Receipt.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    for shard in found.shards:
        file = job.out / shard.name
        if not file.is_file() or records.sha256(file) != shard.sha256:
            return None
    return found


def clear(out: Path) -> None:
    """Removes a dataset, whole or not, and nothing else."""
    if not (out / NAME).exists() and not (out / JOURNAL / REQUEST).exists():
        return
    for split in SPLITS:
        for file in [*out.glob(f"{split}-*.array_record"), *out.glob(f".{split}-*.partial")]:
            file.unlink()
    shutil.rmtree(out / TOKENIZER, ignore_errors=True)
    # Until here it says whose the rest is; without its shards nobody takes it for a dataset.
    (out / NAME).unlink(missing_ok=True)
    for entry in (out / JOURNAL).iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
