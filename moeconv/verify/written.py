"""Writing a report: verify.json, verify.md and the plots, and nothing old beside them."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from moeconv.errors import OutputError
from moeconv.hf.config import to_json
from moeconv.untrusted.files import read_inside
from moeconv.verify.markdown import to_markdown
from moeconv.verify.plots import PLOTS, draw_plots
from moeconv.verify.report import REPORT_NAME, Report

PAGE_NAME = "verify.md"


def earlier_report(folder: Path) -> Report | None:
    """The report that lies in a folder, if it can be read."""
    try:
        return Report.read(read_inside(folder, REPORT_NAME))
    except (OSError, ValueError):
        return None


def demand_writable(folder: Path) -> None:
    """Whether a report can be written there.

    Raises:
        OutputError: It cannot.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(
            f"the report cannot be written to {folder}; give another folder with --report"
        )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes the files of a report; returns their paths.

    They are made beside and then renamed: an earlier report is there until this one is whole.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".moeconv-verify-", dir=folder) as name:
            fresh = Path(name)
            plots = draw_plots(report, fresh)
            page = to_markdown(report, plots)
            (fresh / PAGE_NAME).write_text(page, encoding="utf-8")
            (fresh / REPORT_NAME).write_bytes(to_json(report.model_dump(mode="json")))
            # The verdict last: what is interrupted before leaves the earlier one.
            written = [*plots, fresh / PAGE_NAME, fresh / REPORT_NAME]
            for path in written:
                _sync(path)
            for path in written:
                path.replace(folder / path.name)
        for stale in set(PLOTS) - {path.name for path in plots}:
            (folder / stale).unlink(missing_ok=True)
        _sync(folder)
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{folder} cannot be written: {why}") from None
    return [folder / path.name for path in reversed(written)]


def _sync(path: Path) -> None:
    """Waits until the disk has a file, or the names of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
