"""pyproject.toml lists the packages by hand; these hold it to what is there."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed():
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("moeconv/**/*.py")}
    trainer = {file.parent.relative_to(ROOT / "train").parts for file in ROOT.glob("train/**/*.py")}
    there |= {".".join(("moeconv_train", *parts)) for parts in trainer}
    assert set(SETUPTOOLS["packages"]) == there


def test_every_data_file_is_packed():
    roots = {"moeconv": ROOT / "moeconv", "moeconv_train": ROOT / "train"}
    for package, root in roots.items():
        packed = {file for glob in SETUPTOOLS["package-data"][package] for file in root.glob(glob)}
        there = {
            file
            for file in root.rglob("*")
            if file.is_file() and file.suffix not in (".py", ".pyc")
        }
        assert packed == there


def test_no_pin_file_names_a_machine_or_an_index():
    for file in (ROOT / "requirements").rglob("*.txt"):
        text = file.read_text()
        assert "://" not in text and "--index" not in text and "--find-links" not in text
        assert "--hash=sha256:" in text


def pins(name):
    """Package -> version of a pin file."""
    return dict(
        re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.M)
    )


def test_kaggle_trains_without_torch_and_with_one_cuda():
    kaggle = pins("kaggle.txt")
    assert not [name for name in kaggle if name.startswith(("torch", "triton"))]
    assert {"maxtext", "jax-cuda12-plugin", "nvidia-cudnn-cu12"} <= kaggle.keys()
    for file in ("kaggle.txt", "dev.txt", "convert.txt"):
        stems = [re.sub(r"-cu1\d$", "", name) for name in pins(file)]
        assert len(stems) == len(set(stems)), file


def test_kaggle_trains_with_the_versions_that_are_tested():
    kaggle, dev = pins("kaggle.txt"), pins("dev.txt")
    assert {n: v for n, v in kaggle.items() if v != dev.get(n, v)} == {}
    plugin = pins("cuda-plugin.txt")["jax-cuda12-plugin"]
    assert kaggle["jax"] == kaggle["jax-cuda12-plugin"] == plugin


def test_nobody_is_sent_to_an_index_that_has_no_moeconv():
    """`pip install "moeconv[train]"` finds nothing: an extra is installed from a checkout."""
    texts = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("train/kaggle/*")]
    texts += ROOT.glob("moeconv/**/*.py")
    wrong = re.compile(r"pip install (-\S+ )*[\"']?moeconv\b")
    others = {ROOT / "docs" / "train.md", ROOT / "docs" / "memory.md"}
    assert [file for file in texts if file not in others and wrong.search(file.read_text())] == []
