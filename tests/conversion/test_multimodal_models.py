"""Multimodal releases: the text model is converted, and what is left out is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from released_lab import Tensors, assert_equal, config, int4, rewrite, save, there_and_back
from safetensors.torch import load_file

from moeconv.conversion.incoming import plan_incoming
from moeconv.conversion.options import ConvertOptions
from moeconv.errors import ConfigError, TensorError
from moeconv.hf.files import LocalFiles
from moeconv.mapping.reading import MULTIMODAL

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 6, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
    "Gemma4": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 6,
            "sliding_window": 16,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_bidirectional_attention": "vision",
        },
    ),
    "Llama4": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
    ),
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


def text_of(tensors: Tensors) -> Tensors:
    """The text model's tensors, by the names that they have in it."""
    found = {}
    for name, tensor in tensors.items():
        for begins, own in MULTIMODAL.items():
            if name.startswith(begins):
                found[own + name.removeprefix(begins)] = tensor
        if name.startswith("lm_head"):
            found[name] = tensor
    return found


@pytest.mark.parametrize("family", sorted(TEXT))
def test_the_text_model_is_taken(tmp_path: Path, family: str) -> None:
    kind, sizes = TEXT[family]
    folder = tmp_path / "model"
    made = getattr(transformers, f"{family}Config")(
        text_config=config(kind, **sizes).to_dict(),
        vision_config=VISION,
        **({"audio_config": None} if family == "Gemma4" else {}),
    )
    name = f"{family}ForConditionalGeneration"
    tensors = save(folder, made, getattr(transformers, name))
    assert json.loads((folder / "config.json").read_text())["architectures"] == [name]
    found, plan = there_and_back(folder, tmp_path)
    expected = text_of(tensors)
    assert 20 < len(expected) < len(tensors)
    assert_equal(found, expected)
    assert len(plan.dropped) == len(tensors) - len(expected)
    assert any("vision" in warning and "left out" in warning for warning in plan.warnings)


def kimi(folder: Path) -> Tensors:
    """A Kimi-K2.5 as it is published, its experts in int4; the text model's numbers."""
    from test_quantised_models import DEEPSEEK, EXPERTS

    own = {**DEEPSEEK, "moe_intermediate_size": 32, "n_group": 1}
    numbers = int4(folder, save(folder, config("DeepseekV3Config", **own)), EXPERTS)
    text = json.loads((folder / "config.json").read_text())
    method = text.pop("quantization_config")
    whole = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
        "model_type": "kimi_k25",
        "text_config": {**text, "model_type": "kimi_k2", "quantization_config": method},
        "tie_word_embeddings": False,
        "vision_config": {"mm_hidden_size": 16},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    stored = {
        f"language_model.{name}": tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    stored["vision_tower.patch_embed.proj.weight"] = torch.ones(3)
    stored["mm_projector.pre_norm.weight"] = torch.ones(3)
    rewrite(folder, stored)
    return numbers


def test_a_quantised_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    expected = kimi(folder)
    found, plan = there_and_back(folder, tmp_path)
    assert_equal(found, expected)
    assert plan.dropped == {
        "mm_projector.pre_norm.weight": "only the text model of a multimodal one is converted, "
        "without its projector of images",
        "vision_tower.patch_embed.proj.weight": "only the text model of a multimodal one is "
        "converted, without its vision tower",
    }


def test_what_is_not_known_is_not_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    kimi(folder)
    stored = load_file(folder / "model.safetensors")
    rewrite(folder, {**stored, "language_model.model.adapter.weight": torch.ones(3)})
    with pytest.raises(TensorError, match=r"model\.adapter\.weight"):
        plan_incoming(LocalFiles(folder), ConvertOptions())
    rewrite(folder, stored, text_config=None)
    with pytest.raises(ConfigError, match="has a text_config"):
        plan_incoming(LocalFiles(folder), ConvertOptions())
