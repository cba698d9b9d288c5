"""train/kaggle/export_to_hub.sh: a finished run to the Hub, in one command."""

import os
import subprocess
import sys

import cli_runner
import outputs
import pytest

SCRIPT = cli_runner.ROOT / "train" / "kaggle" / "export_to_hub.sh"


def export(*args: object, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in cli_runner.environment().items() if k != "HF_TOKEN"}
    return subprocess.run(
        [SCRIPT, *map(str, args)],
        env={**clean, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_help_and_what_is_missing(tmp_path):
    helped = export("--help")
    assert helped.returncode == 0 and "export_to_hub.sh RUN_DIR [REPO_ID]" in helped.stdout
    assert export().returncode == 2
    nothing = export(tmp_path / "no-run", HF_TOKEN="x")
    assert nothing.returncode == 2 and "there is no run directory" in nothing.stderr
    wrong = export(tmp_path, HF_TOKEN="x")
    assert wrong.returncode == 2 and "checkpoints/" in wrong.stderr
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    untold = export(tmp_path / "run")
    assert untold.returncode == 2 and "HF_TOKEN is not set" in untold.stderr
    assert os.listdir(tmp_path) == ["run"]


def test_what_cannot_be_converted_is_not_pushed(hub, tmp_path):
    run = outputs.write_run(tmp_path / "run")
    (run / "moeconv.json").write_text("{}")
    ran = export(run, "alice/exported", HF_TOKEN="tok", HF_ENDPOINT=hub.url)
    assert ran.returncode == 4
    assert "==> verify" not in ran.stdout and hub.seen == []


@pytest.mark.slow
def test_a_run_is_converted_verified_and_pushed(hub, tmp_path):
    """MaxText and transformers run in processes of their own, as on Kaggle."""
    run = outputs.write_run(tmp_path / "run")
    online = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": os.environ["HF_TOKEN"],
        "CUDA_VISIBLE_DEVICES": "",
    }
    ran = export(run, "alice/exported", "--private", **online)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    repo = hub.repo("alice/exported")
    assert repo.private and "model.safetensors" in repo.files()
    assert f"commit: {hub.url}/alice/exported/commit/{repo.branches['main']}" in ran.stdout
    assert "**PASS" in hub.text("README.md", "alice/exported")
    assert os.environ["HF_TOKEN"] not in ran.stdout + ran.stderr

    # Once more, to the repository that the run names, with a README of the user's.
    (tmp_path / "run-hf" / "README.md").write_text("my own words\n")
    ran = export(run, **online)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert hub.text("README.md").endswith("my own words\n")
    first, second = repo.files(), hub.repo().files()
    assert first["model.safetensors"] == second["model.safetensors"]
    # The content is on the Hub already, by its digest.
    assert len(hub.uploaded()) == 1
