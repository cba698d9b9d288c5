"""Released models that are quantised: to MaxText and back they are their dequantised tensors."""

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from released_lab import (
    INT4,
    assert_equal,
    config,
    fp8,
    int4,
    mxfp4,
    rewrite,
    save,
    there_and_back,
)
from safetensors.torch import load_file

from moeconv.conversion.incoming import plan_incoming
from moeconv.conversion.options import ConvertOptions
from moeconv.errors import MoeconvError, TensorError, UnsupportedError
from moeconv.hf.files import LocalFiles

QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
DEEPSEEK = {**hf_models.CONFIGS["deepseek_v3"][1], "rms_norm_eps": 1e-6}
LINEAR = r"model\.layers\..*(proj|proj_with_mqa|q_[ab]_proj)\.weight"
EXPERTS = r"model\.layers\..*experts\..*proj\.weight"


def qwen3_moe(folder: Path) -> dict[str, torch.Tensor]:
    return save(folder, config("Qwen3MoeConfig", **QWEN3_MOE))


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder = tmp_path / "model"
    expected = fp8(folder, qwen3_moe(folder), LINEAR, (16, 8))
    stored = load_file(folder / "model.safetensors")
    quantised = [name for name in stored if f"{name}_scale_inv" in stored]
    assert len(quantised) == 2 * (4 + 4 * 3)
    for name in quantised:
        theirs = Fp8Dequantize(None)._dequantize_one(
            stored[name], stored[f"{name}_scale_inv"], torch.bfloat16
        )
        assert torch.equal(theirs, expected[name]), name
    found, plan = there_and_back(folder, tmp_path)
    assert_equal(found, expected)
    query = next(e for name, e in plan.edges.items() if name.endswith("query.kernel"))
    assert query.bound() == pytest.approx(2**-8 + 2**-24, rel=1e-3)
    assert "q_proj.weight_scale_inv" in query.describe()


@pytest.mark.parametrize("scan", [True, False])
def test_fp8_blocks_are_cut_by_heads_and_ends(tmp_path: Path, scan: bool) -> None:
    """A DeepSeek-V3, whose last blocks are not whole, and whose further layer is left out."""
    folder = tmp_path / "model"
    tensors = save(folder, config("DeepseekV3Config", **DEEPSEEK))
    expected = fp8(folder, tensors, LINEAR, (7, 9), activation_scheme="dynamic", fmt="e4m3")
    stored = load_file(folder / "model.safetensors")
    further = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in stored.items()
        if "layers.1.self_attn" in name
    }
    rewrite(folder, {**stored, **further}, num_nextn_predict_layers=1)
    found, plan = there_and_back(folder, tmp_path, scan_layers=scan)
    assert_equal(found, expected)
    assert {name for name in plan.dropped if "weight" in name} == {
        name for name in further if not name.endswith("_scale_inv")
    }


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "model"
    made = config("GptOssConfig", hidden_size=64, intermediate_size=96, num_local_experts=4,
                  num_experts_per_tok=2, sliding_window=16)  # fmt: skip
    expected = mxfp4(folder, save(folder, made))
    stored = load_file(folder / "model.safetensors")
    packed = [name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")]
    assert len(packed) == 4
    for name in packed:
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(theirs, expected[name]), name
    found, plan = there_and_back(folder, tmp_path)
    assert_equal(found, expected)
    assert all(edge.bound() == 0.0 for edge in plan.edges.values())


def test_int4_in_groups_is_what_compressed_tensors_makes_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    expected = int4(folder, qwen3_moe(folder), EXPERTS)
    found, plan = there_and_back(folder, tmp_path)
    assert_equal(found, expected)
    kernel = next(e for name, e in plan.edges.items() if name.endswith("wi_0"))
    assert kernel.bound() == pytest.approx(2**-8)


def test_one_scale_for_each_channel(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    expected = int4(folder, qwen3_moe(folder), EXPERTS, group=32)
    method = json.loads(json.dumps(INT4))
    method["config_groups"]["group_0"]["weights"] |= {"strategy": "channel", "group_size": None}
    rewrite(folder, load_file(folder / "model.safetensors"), quantization_config=method)
    found, _ = there_and_back(folder, tmp_path)
    assert_equal(found, expected)


def test_numbers_are_the_same_in_a_wider_array(tmp_path: Path) -> None:
    """--dtype float32 widens what transformers makes of them, and the way back narrows it."""
    folder = tmp_path / "model"
    expected = fp8(folder, qwen3_moe(folder), LINEAR, (16, 8))
    found, plan = there_and_back(folder, tmp_path, dtype="float32")
    assert {edge.dtype for edge in plan.edges.values()} == {"float32"}
    assert_equal(found, expected)


def refusal(folder: Path, kind: type[MoeconvError]) -> str:
    with pytest.raises(kind) as caught:
        plan_incoming(LocalFiles(folder), ConvertOptions())
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, whose zero points"),
        ({"quant_method": "awq"}, "quantised by awq, whose interleaved packing"),
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes, whose tables"),
        ({"quant_method": "fbgemm_fp8"}, "quantised by fbgemm_fp8; moeconv reads fp8, mxfp4"),
        ({"bits": 4}, "names no quant_method"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is None"),
        ({**INT4, "format": "float-quantized"}, "format of compressed-tensors is"),
        (
            {**INT4, "config_groups": {"g": {"weights": {"num_bits": 8}}}},
            "num_bits of its weights is 8; moeconv reads 4",
        ),
        (
            {**INT4, "config_groups": {"g": {"weights": {"num_bits": 4, "symmetric": False}}}},
            "symmetric of its weights is False; moeconv reads True",
        ),
        (
            {**INT4, "config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
            "reads group and channel",
        ),
    ],
)
def test_other_quantisations_are_refused_by_name(
    tmp_path: Path, method: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "model"
    rewrite(folder, qwen3_moe(folder), quantization_config=method)
    sentence = refusal(folder, UnsupportedError)
    assert words in sentence and "config.json" in sentence and "in bfloat16" in sentence


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fp8(folder, qwen3_moe(folder), LINEAR, (16, 8))
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    scales = stored.pop(f"{name}_scale_inv")
    rewrite(folder, stored)
    assert f"its scales {name}_scale_inv are missing" in refusal(folder, TensorError)
    rewrite(folder, {**stored, f"{name}_scale_inv": scales[1:]})
    assert f"{name}_scale_inv [1, 4] does not hold the scales" in refusal(folder, TensorError)
    path = folder / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "quantization_config"}
    path.write_text(json.dumps(kept))
    rewrite(folder, {k: v for k, v in stored.items() if not k.endswith("_scale_inv")})
    assert "is stored as float8_e4m3fn, and config.json does not say" in refusal(
        folder, UnsupportedError
    )


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fp8(folder, qwen3_moe(folder), LINEAR, (16, 8))
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.self_attn.q_proj.weight_scale_inv"][0, 1] = torch.nan
    rewrite(folder, stored)
    with pytest.raises(TensorError, match=r"q_proj\.weight_scale_inv"):
        there_and_back(folder, tmp_path)
    assert not (tmp_path / "maxtext").exists()
