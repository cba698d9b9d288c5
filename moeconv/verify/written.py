"""Writing a report: verify.json, verify.md and the plots, and nothing old beside them."""

import os
from pathlib import Path

from moeconv.errors import OutputError
from moeconv.hf.config import to_json
from moeconv.verify.markdown import to_markdown
from moeconv.verify.plots import PLOTS, draw_plots
from moeconv.verify.report import REPORT_NAME, Report

PAGE_NAME = "verify.md"


def earlier_report(folder: Path) -> Report | None:
    """The report that lies in a folder, if it can be read."""
    try:
        return Report.model_validate_json((folder / REPORT_NAME).read_bytes())
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

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (REPORT_NAME, PAGE_NAME, *PLOTS):
            (folder / name).unlink(missing_ok=True)
        plots = draw_plots(report, folder)
        page = folder / PAGE_NAME
        page.write_text(to_markdown(report, plots), encoding="utf-8")
        path = folder / REPORT_NAME
        path.write_bytes(to_json(report.model_dump(mode="json")))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from None
    return [path, page, *plots]
