"""A Hugging Face model, as convert writes it, to be damaged or served."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
from cli_runner import Ran, moeconv

from moeconv.untrusted import strict_json


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of four layers in several files; not to be changed."""
    folder = tmp_path_factory.mktemp("incoming")
    run = synthetic.write(folder / "run", block="qwen3_moe")
    config = run.config_file(folder)
    ran = moeconv(
        "convert", run.run, folder / "model", "--config", config, "--max-shard-size", "60kB"
    )
    assert ran.code == 0, ran.err
    model = folder / "model"
    (model / "moeconv_manifest.json").unlink()
    assert len(list(model.glob("*.safetensors"))) > 1
    return model


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "model"))


Edit = Callable[..., dict[str, Any]]


@pytest.fixture
def edit(model: Path) -> Edit:
    """Changes a JSON file of the model; gives its content."""

    def change(name: str = "config.json", **keys: Any) -> dict[str, Any]:
        content: dict[str, Any] = strict_json.loads((model / name).read_bytes())
        content |= keys
        (model / name).write_bytes(strict_json.dumps(content))
        return content

    return change


@pytest.fixture
def refused(model: Path, tmp_path: Path) -> Callable[..., str]:
    """Converts the model, which must be refused, with nothing left; gives the sentence."""

    def refuse(code: int) -> str:
        before = sorted(tmp_path.rglob("*"))
        ran: Ran = moeconv("convert", model, tmp_path / "out", "--quiet")
        assert ran.code == code, ran.err
        assert sorted(tmp_path.rglob("*")) == before
        return ran.error

    return refuse
