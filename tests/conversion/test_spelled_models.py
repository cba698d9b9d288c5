"""Tensors by the names of transformers 5's modules, which it writes where it undoes nothing."""

from pathlib import Path

import pytest
import transformers
from released_lab import assert_equal, config, fp8, save, there_and_back
from safetensors.torch import load_file
from test_quantised_models import DEEPSEEK, QWEN3_MOE, refusal

from moeconv.errors import UnsupportedError

V2 = {
    **DEEPSEEK,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "rope_parameters": {**DEEPSEEK["rope_parameters"]},
}
MODELS = {
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": QWEN3_MOE,
    "DeepseekV3Config": DEEPSEEK,
    "DeepseekV2Config": V2,
    "Qwen3NextConfig": {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 3,
        "linear_conv_kernel_dim": 3,
    },
}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_fused_experts_are_taken_apart(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    save(folder, config(kind, **MODELS[kind]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "usual")  # a bias of a router it has made float32
    expected = load_file(tmp_path / "usual" / "model.safetensors")
    model.save_pretrained(folder, save_original_format=False)
    names = load_file(folder / "model.safetensors").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert len(names) < len(expected)
    found, _ = there_and_back(folder, tmp_path)
    assert_equal(found, expected)


def test_they_may_be_in_fp8(tmp_path: Path) -> None:
    """Gate and up are one tensor, and no block has some of both."""
    folder = tmp_path / "model"
    save(folder, config("Qwen3MoeConfig", **QWEN3_MOE))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(folder, save_original_format=False)
    stored = load_file(folder / "model.safetensors")
    numbers = fp8(folder, stored, r".*experts\.(gate_up|down)_proj", (1, 16, 8))
    found, _ = there_and_back(folder, tmp_path)
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        both = numbers[f"{place}.gate_up_proj"]
        for expert in range(4):
            own = both[expert].split(32)
            assert found[f"{place}.{expert}.gate_proj.weight"].equal(own[0])
            assert found[f"{place}.{expert}.up_proj.weight"].equal(own[1])
            down = numbers[f"{place}.down_proj"][expert]
            assert found[f"{place}.{expert}.down_proj.weight"].equal(down)


def test_group_limited_greedy_routing_is_refused(tmp_path: Path) -> None:
    """MaxText chooses groups only as DeepSeek-V3 does (layers/moe.py `get_topk`)."""
    folder = tmp_path / "model"
    own = {**V2, "n_group": 2, "topk_method": "group_limited_greedy"}
    save(folder, config("DeepseekV2Config", **own))
    sentence = refusal(folder, UnsupportedError)
    assert "n_group is 2, and MaxText's deepseek computes what 1 means" in sentence
