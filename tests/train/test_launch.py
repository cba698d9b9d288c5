"""Two steps of the tiny run by MaxText itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from moeconv_train import launch

CONFIG = Path(launch.__file__).parent / "configs" / "tiny_cpu.yml"


@pytest.mark.slow
def test_a_run_leaves_checkpoint_sidecar_and_tokenizer(tmp_path):
    words = [sys.executable, "-m", "moeconv_train", str(CONFIG), "--output", str(tmp_path)]
    # As from a user's shell: conftest.py asks for other devices.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    result = subprocess.run(
        [*words, "steps=2"],
        env=environment,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Num_devices: 2" in result.stderr + result.stdout

    run = tmp_path / "tiny"
    items = run / "checkpoints" / "1" / "items"
    assert (items / "_METADATA").is_file()
    sidecar = json.loads((run / "moeconv.json").read_text())
    assert (run / sidecar["tokenizer"] / "tokenizer.json").is_file()
    config = sidecar["config"]
    assert (config["decoder_block"], config["num_experts_per_tok"]) == ("envy", 2)
    assert config["rope_max_timescale"] == 500_000
    assert str(tmp_path) not in json.dumps(config)
    # MaxText's own messages say when it began: the sidecar was there before.
    assert (run / "moeconv.json").stat().st_mtime <= (items / "_METADATA").stat().st_mtime
