"""The Kaggle notebook: its cells, run with stand-ins for what only Kaggle has."""

import ast
import json
import os
import sys
import types
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "train" / "kaggle" / "train_on_kaggle.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def cell_with(text):
    """The source of the cell that has this in it."""
    return next(cell for cell in map("".join, (c["source"] for c in CELLS)) if text in cell)


def test_the_notebook_shows_what_there_is(tmp_path, monkeypatch, capsys):
    """A cell that raises would end the notebook as failed, and a run may have no plot yet."""
    cell = cell_with("loss.png")
    shown = []
    display = types.SimpleNamespace(Image=lambda path: path, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    cell = cell.replace("/kaggle/working", str(tmp_path))
    exec(cell, {})
    assert shown == []
    for name, sidecar in (("early", "moeconv.json"), ("late", "moeconv_run.json")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / sidecar).touch()
    (tmp_path / "runs" / "late" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "runs" / "late" / "loss.png").touch()
    exec(cell, {})
    assert shown == [str(tmp_path / "runs" / "late" / "loss.png")]
    assert capsys.readouterr().out.splitlines() == ["early no step yet", 'late {"step": 2}']


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the cell that trains; the script, in the shell, ends with `code`."""
    cell = "".join(
        line for line in cell_with('!bash "{').splitlines(keepends=True) if line[0] != "!"
    ).replace('"/kaggle', f'"{tmp_path}')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AT_LEAST", "7")

    def run(code=0):
        names = {"_exit_code": code}  # IPython's, of the last line for the shell
        exec(cell, names)
        return names["MOECONV"]

    return run


def checkout(folder):
    (folder / "train" / "kaggle").mkdir(parents=True)
    (folder / "train" / "kaggle" / "kaggle_train.sh").touch()


@pytest.mark.parametrize(
    "below", ["input/moeconv", "input/datasets/me/moeconv/moeconv-main", "working/moeconv"]
)
def test_the_notebook_finds_its_checkout(train, tmp_path, below):
    with pytest.raises(SystemExit, match="no checkout of moeconv"):
        train()
    checkout(tmp_path / below)
    assert train() == str(tmp_path / below)
    assert os.environ["AT_LEAST"] == ""


def test_a_clone_comes_before_what_is_attached_and_mounts_may_be_links(train, tmp_path):
    checkout(tmp_path / "elsewhere" / "moeconv")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "data").symlink_to(tmp_path / "elsewhere")
    assert train() == str(tmp_path / "input" / "data" / "moeconv")
    checkout(tmp_path / "working" / "clone")
    assert train() == str(tmp_path / "working" / "clone")


def test_the_notebook_fails_with_the_script_where_no_output_is_lost(train, tmp_path):
    checkout(tmp_path / "working" / "moeconv")
    with pytest.raises(SystemExit, match="exit code 4"):
        train(code=4)
    (tmp_path / "working" / "runs" / "one" / "checkpoints" / "199").mkdir(parents=True)
    train(code=4)


def test_the_notebook_is_clean_and_runs_the_script():
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    text = "".join(line for cell in cells for line in cell["source"])
    assert "train/kaggle/kaggle_train.sh" in text and "export_to_hub.sh" in text
    for cell in cells:
        python = [line for line in cell["source"] if not line.startswith("!")]
        ast.parse("".join(python))
    assert "hf_" not in text  # no token of anybody
