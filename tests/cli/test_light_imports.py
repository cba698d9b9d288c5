"""The command line imports what the command needs, and is documented as it is."""

import inspect as python_inspect
import subprocess
import sys
from pathlib import Path

import cli_runner
import pytest
from cli_runner import moeconv
from refusals import CLICK_USAGE, out_of, tokenizer

from moeconv import errors
from moeconv.errors import MoeconvError

DOCS = Path(__file__).parents[2] / "docs"


# --- light imports ------------------------------------------------------------------------------

HEAVY = ("jax", "torch", "transformers", "maxtext", "flax", "orbax")


def loaded(*args: object) -> set[str]:
    """Top-level modules in a process that ran `moeconv ARGS`."""
    code = (
        "import sys\n"
        "from moeconv.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "finally:\n    print(*sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True, text=True, env=cli_runner.environment(), check=True,
    )  # fmt: skip
    return set(ran.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["convert", "--help"]])
def test_help_is_light(args):
    found = loaded(*args)
    assert "click" in found
    assert not found & {*HEAVY, "tensorstore", "numpy", "huggingface_hub", "pydantic", "rich"}


def test_convert_needs_no_framework(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 60)
    config = checkpoint.config_file(checkpoint.run.parent)
    args = ["convert", checkpoint.run, out_of(checkpoint), "--config", config, "--tokenizer", path]
    found = loaded(*args)
    assert "tensorstore" in found
    assert not found & set(HEAVY)
    assert not loaded("inspect", checkpoint.run) & set(HEAVY)
    assert not loaded("families") & {*HEAVY, "tensorstore", "huggingface_hub"}


# --- the documentation --------------------------------------------------------------------------


def test_exit_codes_are_documented():
    """docs/exit-codes.md has a row for every class of error, with its code and its meaning."""
    rows = {}
    for line in (DOCS / "exit-codes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].isdigit():
            rows[int(cells[0])] = cells
    classes = {
        cls.exit_code: cls
        for _, cls in python_inspect.getmembers(errors, python_inspect.isclass)
        if issubclass(cls, MoeconvError)
    }
    count = len([c for c in vars(errors).values() if isinstance(c, type)])
    assert len(classes) == count, "every class has a code of its own"
    assert set(rows) == {0, 130, *classes}
    for code, cls in classes.items():
        if code > CLICK_USAGE:
            assert rows[code][1] == python_inspect.getdoc(cls).splitlines()[0]
        assert rows[code][2], "a typical fix"


def test_help_is_documented_as_it_is_printed():
    """`make docs-check` holds the rest."""
    last = moeconv("inspect", "--help").out.splitlines()[-1].split()
    assert last[:2] == ["-h,", "--help"]
    lines = [line.split() for line in (DOCS / "cli.md").read_text().splitlines()]
    assert not [line for line in lines if line[:1] == ["--help"]]
    assert [line for line in lines if line[:2] == last[:2]]
