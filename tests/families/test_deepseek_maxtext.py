"""DeepSeek against MaxText: checkpoints of older releases, and the configs that MaxText ships."""

import numpy as np
import orbax_writer
import pytest
from checkpoints.deepseek import DEEPSEEK_V3
from helpers import assert_same_model, config_file, run

from moeconv.arch.config_sources import resolve_config
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.layout import build_layout
from moeconv.arch.parameters import LayerKind
from moeconv.arch.resolve import resolve
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.families import blocks, target_for
from moeconv.mapping.rules import Options
from moeconv.verification.models.maxtext import MaxTextModel

pytestmark = [pytest.mark.slow, pytest.mark.proof("DeepSeek by all levels"), pytest.mark.maxtext]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_before_0_2_5_the_router_bias_was_a_parameter(maxtext_lab, tmp_path, scan_layers):
    """On the scan axis; the model and MaxText's logits are the same."""
    made = maxtext_lab.checkpoint(DEEPSEEK_V3, {"scan_layers": scan_layers})
    arrays = {tuple(name.split(".")): value for name, value in made.params.items()}
    for path in [path for path in arrays if path[-2:] == ("gate", "bias")]:
        arrays[path] = np.ascontiguousarray(arrays[path].T)
    chunks = {path: value.shape for path, value in arrays.items()}
    step = orbax_writer.write(
        tmp_path / "old/checkpoints/0", arrays, chunks, scan_layers=scan_layers
    )
    run(made, tmp_path / "new")
    config = config_file(tmp_path / "config", made.config)
    convert(plan_conversion(str(step), ConvertOptions(config=config)), tmp_path / "out")
    old, new = (tmp_path / name / "model.safetensors" for name in ("out", "new"))
    assert old.read_bytes() == new.read_bytes()
    tokens = np.arange(32, dtype=np.int32)[None]
    items = (step / "items", made.items)
    logits = [MaxTextModel.load(each, made.config).logits(tokens) for each in items]
    assert np.array_equal(*logits)
    assert_same_model(made, tmp_path / "out")


# MaxText's file, its sizes that only shapes tell, and the number of its layers and dense ones.
RELEASED = {
    "deepseek2-16b": (
        {"D": 2048, "H": 16, "F": 10944, "M": 1408, "E": 64, "S": 2816, "V": 102400},
        27,
        1,
    ),
    "deepseek3-671b": (
        {"D": 7168, "H": 128, "F": 18432, "M": 2048, "E": 256, "S": 2048, "V": 129280, "q": 1536},
        61,
        3,
    ),
}
HEADS = {"c": 512, "v": 128, "r": 512 + 64, "k": 128 + 64, "b": 128 + 128}
# MaxText's configs have no groups of experts (configs/models/deepseek3-671b.yml).
DEPARTS = {"n_group", "topk_group"}
# Of training, of loading code, of multi-token prediction and of a tokenizer.
ASIDE = {"auto_map", "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers",
         "bos_token_id", "eos_token_id", "torch_dtype", "transformers_version"}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_the_published_one(name):
    from maxtext.checkpoint_conversion.utils import hf_model_configs

    sizes, layers, dense = RELEASED[name]
    attention, moe = ("mla_lora", "moe+bias") if "q" in sizes else ("mla", "moe")
    kinds = [LayerKind(f"{attention} dense")] * dense
    kinds += [LayerKind(f"{attention} {moe}")] * (layers - dense)
    block = blocks()["deepseek"]
    way = next(way for way in block.stackings if way.scanned)
    shape = [(1, dense), (1, layers - dense)]
    layout = build_layout(block, way, kinds, {**HEADS, **sizes}, blocks=shape)
    told = resolve_config({"model_name": name}, Provenance(Origin.CONFIG, "released.yml"), ())
    model = resolve(layout, told).model()
    ours = {key.key: key.value(model, Options()) for key in target_for(model).config}
    published = getattr(hf_model_configs, name.replace("-", "_") + "_dict")
    for key, value in published.items():
        if key == "rope_scaling":
            told_there = {k: v for k, v in value.items() if k not in ("type", "rope_theta")}
            assert ours[key].items() >= told_there.items()
            assert ours[key]["rope_type"] == value["type"]
        elif key not in ASIDE:
            assert (ours[key] == value) or (key in DEPARTS and ours[key] == 1), key
