"""Qwen3-Next without MaxText: how its layers are kept, its head apart, and no shared expert."""

import json

import numpy as np
import pytest
import synthetic

from moeconv.arch.detection import detect_layout
from moeconv.arch.layout import build_layout
from moeconv.arch.parameters import LayerKind
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import TensorError
from moeconv.families import blocks
from moeconv.hf.safetensors import read_header
from moeconv.mapping.reverse import restore
from moeconv.tensor.dtypes import DTYPES
from moeconv.verification.levels.config_readers import as_transformers_4, as_transformers_5

LAYERS = [LayerKind("linear moe"), LayerKind("linear moe"), LayerKind("gated moe")]


@pytest.mark.parametrize("block", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_module_for_each_layer_of_a_block(block: str, axis: int) -> None:
    """Qwen3.5, and Qwen3-Next before MaxText 0.2.5; without a shared expert."""
    page = blocks()[block]
    way = page.stackings[-1]
    made = build_layout(page, way, LAYERS * 2, synthetic.SIZES, blocks=[(3, 2)], scan_axis=axis)
    assert "decoder.layers.layer_2.attention.attention.query.kernel" in {
        a.name for a in made.arrays
    }
    found = detect_layout({a.path: a.shape for a in made.arrays}, [page], scan_axis=axis)
    assert found == made


def converted(folder, **told):
    checkpoint = synthetic.write(folder / "run", "qwen3_next", tied=True, dtype="bfloat16")
    plan = plan_conversion(
        str(checkpoint.run), ConvertOptions(config=checkpoint.config_file(**told))
    )
    convert(plan, folder / "out")
    (file,) = (folder / "out").glob("*.safetensors")
    tensors = {
        name: np.memmap(file, DTYPES[spec.dtype], "r", offset=offset, shape=spec.shape)
        for name, (spec, offset) in read_header(file).items()
    }
    return plan.plan, json.loads((folder / "out" / "config.json").read_text()), tensors


def test_a_tied_head_with_normalised_logits_is_apart(tmp_path) -> None:
    """In 16 bits the norm that is added to 1 could not have the factor."""
    plan, config, tensors = converted(tmp_path)
    assert config["tie_word_embeddings"] is False
    assert any("written apart from the embedding" in text for text in plan.warnings)
    head, table = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    assert np.array_equal(head.astype(np.float32), table.astype(np.float32) / 4)  # sqrt(16)
    back = restore(plan.edges.values(), tensors.__getitem__)
    assert np.array_equal(back["token_embedder.embedding"], table)
    wrong = {**tensors, "lm_head.weight": (head.astype(np.float32) * 1.02).astype(head.dtype)}
    with pytest.raises(
        TensorError, match=r"lm_head\.weight should be a copy of model\.embed_tokens"
    ):
        restore(plan.edges.values(), wrong.__getitem__)


def test_a_tied_head_without_is_not(tmp_path) -> None:
    plan, config, tensors = converted(tmp_path, normalize_embedding_logits=False)
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors
    assert not any("written apart" in text for text in plan.warnings)


def test_both_releases_of_transformers_read_the_part_that_is_rotated(tmp_path) -> None:
    _, config, _ = converted(tmp_path)
    assert as_transformers_4(config)["rope"] == as_transformers_5(config)["rope"]
    config["partial_rotary_factor"] = 0.25
    assert as_transformers_4(config)["rope"] != as_transformers_5(config)["rope"]
