"""The Kaggle notebook: its cells, run with stand-ins for what only Kaggle has."""

import ast
import json
import sys
import types
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "train" / "kaggle" / "train_on_kaggle.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_shows_what_there_is(tmp_path, monkeypatch, capsys):
    """A cell that raises would end the notebook as failed, and a run may have no plot yet."""
    notebook = json.loads((KAGGLE / "train_on_kaggle.ipynb").read_text())
    cell = next(
        "".join(c["source"]) for c in notebook["cells"] if "loss.png" in "".join(c["source"])
    )
    shown = []
    display = types.SimpleNamespace(Image=lambda path: path, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    cell = cell.replace("/kaggle/working", str(tmp_path))
    exec(cell, {})
    assert shown == []
    for name in ("early", "late"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "moeconv.json").touch()
    (tmp_path / "runs" / "late" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "runs" / "late" / "loss.png").touch()
    exec(cell, {})
    assert shown == [str(tmp_path / "runs" / "late" / "loss.png")]
    assert capsys.readouterr().out.splitlines() == ["early no step yet", 'late {"step": 2}']


@pytest.mark.parametrize(
    "below", ["input/moeconv", "input/datasets/me/moeconv/moeconv-main", "working/moeconv"]
)
def test_the_notebook_finds_its_checkout(tmp_path, monkeypatch, below):
    cell = training_cell().replace('"/kaggle', f'"{tmp_path}')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit, match="no checkout of moeconv"):
        exec(cell, {})
    script = tmp_path / below / "train" / "kaggle" / "kaggle_train.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    names = {}
    exec(cell, names)
    assert names["MOECONV"] == str(tmp_path / below)


def training_cell():
    """The notebook's cell that trains, without the line for the shell."""
    notebook = json.loads((KAGGLE / "train_on_kaggle.ipynb").read_text())
    cell = next(c["source"] for c in notebook["cells"] if '!bash "{' in "".join(c["source"]))
    return "".join(line for line in cell if not line.startswith("!"))


def test_the_notebook_is_clean_and_runs_the_script():
    notebook = json.loads((KAGGLE / "train_on_kaggle.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    text = "".join(line for cell in cells for line in cell["source"])
    assert "train/kaggle/kaggle_train.sh" in text and "export_to_hub.sh" in text
    for cell in cells:
        python = [line for line in cell["source"] if not line.startswith("!")]
        ast.parse("".join(python))
    assert "hf_" not in text  # no token of anybody
