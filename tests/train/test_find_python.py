"""scripts/find_python.sh, with interpreters made up in a temporary directory."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "find_python.sh"
# What the script needs itself; no Python among it.
TOOLS = ("bash", "env")


@pytest.fixture
def machine(tmp_path):
    """A PATH without any Python and an empty home."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        (path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "home").mkdir()
    return tmp_path


def python(path: Path, version: str, *, venv: bool = True, fails: bool = False) -> Path:
    """A fake interpreter: it answers the script's question as that version would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = venv and version.startswith(("3.12", "3.13")) and not fails
    body = f'echo "{path}"' if answers else "echo 'command not found' >&2; exit 127"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def find(machine: Path, *, home: bool = True, **variables: str):
    """What the script says on that machine."""
    environment = {"PATH": str(machine / "bin")} | variables
    if home:
        environment["HOME"] = str(machine / "home")
    bash = str(machine / "bin" / "bash")
    return subprocess.run([bash, str(SCRIPT)], env=environment, text=True, capture_output=True)


def test_nothing_found_is_one_sentence(machine):
    result = find(machine)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Python 3.12" in result.stderr and "PYTHON=" in result.stderr


@pytest.mark.parametrize("name", ["python3.12", "python3.13", "python3", "python"])
def test_found_on_the_path(machine, name):
    expected = python(machine / "bin" / name, "3.12.1")
    assert find(machine).stdout == f"{expected}\n"


def test_3_12_comes_first(machine):
    python(machine / "bin" / "python3", "3.13.0")
    python(machine / "bin" / "python3.13", "3.13.0")
    expected = python(machine / "bin" / "python3.12", "3.12.1")
    assert find(machine).stdout == f"{expected}\n"


def test_an_old_python3_is_passed_over(machine):
    python(machine / "bin" / "python3", "3.11.7")
    expected = python(machine / "bin" / "python", "3.12.1")
    assert find(machine).stdout == f"{expected}\n"


def test_one_without_venv_is_passed_over(machine):
    python(machine / "bin" / "python3.12", "3.12.1", venv=False)
    expected = python(machine / "bin" / "python3.13", "3.13.0")
    assert find(machine).stdout == f"{expected}\n"


@pytest.mark.parametrize("how", ["on the path", "by variable", "in home"])
def test_pyenv_is_searched_where_its_shims_fail(machine, how):
    python(machine / "bin" / "python3.12", "3.12.1", fails=True)
    root = machine / "home" / ".pyenv" if how == "in home" else machine / "elsewhere"
    python(root / "versions" / "3.11.7" / "bin" / "python", "3.11.7")
    python(root / "versions" / "3.13.0" / "bin" / "python", "3.13.0")
    expected = python(root / "versions" / "3.12.1" / "bin" / "python", "3.12.1")
    variables = {}
    if how == "on the path":
        pyenv = machine / "bin" / "pyenv"
        pyenv.write_text(f'#!/bin/bash\n[ "$1" = root ] && echo "{root}"\n')
        pyenv.chmod(0o755)
    elif how == "by variable":
        variables["PYENV_ROOT"] = str(root)
    assert find(machine, **variables).stdout == f"{expected}\n"


def test_the_variable_comes_before_all(machine):
    python(machine / "bin" / "python3.12", "3.12.1")
    expected = python(machine / "mine" / "py", "3.13.0")
    assert find(machine, PYTHON=str(expected)).stdout == f"{expected}\n"


def test_a_wrong_variable_is_said_and_passed_over(machine):
    expected = python(machine / "bin" / "python3.12", "3.12.1")
    wrong = python(machine / "mine" / "py", "3.11.7")
    result = find(machine, PYTHON=str(wrong))
    assert result.stdout == f"{expected}\n"
    assert str(wrong) in result.stderr


def test_no_home(machine):
    result = find(machine, home=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1


def test_this_machine_s_python_is_a_real_one():
    result = subprocess.run([str(SCRIPT)], env=dict(os.environ), text=True, capture_output=True)
    if result.returncode:
        pytest.skip("no suitable Python outside of this environment")
    version = subprocess.run([result.stdout.strip(), "--version"], text=True, capture_output=True)
    assert version.stdout.startswith(("Python 3.12", "Python 3.13"))
