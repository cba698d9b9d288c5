"""The training bench: what it counts, and that its contenders are one model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import train_step

    return train_step


def test_the_models_flops_by_hand(bench):
    keys = {
        "decoder_block": "envy",
        "interleave_moe_layer_step": 2,
        "base_num_decoder_layers": 2,
        "base_emb_dim": 8,
        "head_dim": 4,
        "base_num_query_heads": 2,
        "base_num_kv_heads": 1,
        "base_mlp_dim": 16,
        "base_moe_mlp_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 100,
        "max_target_length": 10,
        "per_device_batch_size": 3,
    }
    attention = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8)  # query, key and value, out: two layers
    dense, experts = 3 * 8 * 16, 8 * 4 + 2 * 3 * 8 * 12
    head = 8 * 100
    norms = (2 * 2 + 1) * 8
    matrices = 2 * (attention + dense + experts + head + norms)
    scores = 2 * (2 * 2 * 8 * 5)  # two layers, two matmuls, five earlier positions
    assert bench.model_flops(keys) == 3 * 30 * (matrices + scores)
    # Whose experts are as wide as base_mlp_dim.
    mixtral = {**keys, "decoder_block": "mixtral", "base_mlp_dim": 12}
    assert bench.model_flops(mixtral) - bench.model_flops(keys) == 3 * 30 * 2 * (experts - dense)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Both recipes' contenders, and what was printed."""
    work = tmp_path_factory.mktemp("bench")
    options = ["--size", "tiny", "--steps", "1", "--json", work / "numbers.json"]
    command = [sys.executable, BENCH, *options, "--one-process", "--work", work]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads((work / "numbers.json").read_text()), result.stdout


@pytest.mark.proof("bench of training", inputs=["benchmarks/train_step.py"])
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["interleaved", "all MoE"])
def test_all_contenders_train_one_model(model, numbers):
    found, printed = numbers[0][model], numbers[1]
    maxtext = [each for name, each in found.items() if name.startswith("MaxText")]
    assert len(maxtext) == 4 and "transformers" in found
    # The same weights and batch, computed four ways.
    first = maxtext[0]["losses"]
    for each in maxtext[1:]:
        assert each["losses"] == pytest.approx(first, abs=1e-5)
    # Tiles do a part of the work. Rows as short as these are one block, which leaves nothing out
    # and computes its scores once more in the backward pass.
    dense, tiles, blocks, both = (each["flops"] for each in maxtext)
    assert tiles < 0.8 * dense and both < 0.8 * blocks
    assert blocks <= 1.02 * dense and both <= 1.02 * tiles
    # Another start, so only near: the logarithm of the vocabulary.
    assert found["transformers"]["losses"][0] == pytest.approx(6.24, abs=0.5)
    for name in (*found, "step / floor", "time / transformers"):
        assert name in printed
