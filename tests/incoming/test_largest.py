"""Released models of their true sizes, as sparse files: what planning them takes."""

import json
import resource

import pytest
from test_config_json import PUBLISHED

from moeconv.arch.arrange import arranged
from moeconv.conversion.described import describe
from moeconv.conversion.incoming import plan_incoming
from moeconv.conversion.options import ConvertOptions
from moeconv.hf.files import LocalFiles
from moeconv.hf.safetensors import TensorSpec, lay_out
from moeconv.mapping.edges import expand

GIB = 2**30
# Kimi-K2 is DeepSeek-V3's architecture: a trillion parameters in 70,000 tensors.
KIMI_K2 = {
    **PUBLISHED["deepseek-v3"],
    "first_k_dense_replace": 1, "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
}  # fmt: skip
QWEN3_235B = {
    **PUBLISHED["qwen3-30b-a3b"],
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_hidden_layers": 94, "max_window_layers": 94,
}  # fmt: skip


def write_sparse(folder, config, files):
    """The model's files with their headers; the weights are holes, which read as zeros."""
    found = describe(config, "config.json")
    layout = arranged(found.block, found.model, scan_layers=None)
    dtypes = {array.name: "bfloat16" for array in layout.arrays}
    edges = expand(found.page, found.model, layout, dtypes)
    specs = [TensorSpec(edge.target, "bfloat16", edge.shape) for edge in edges]
    each, names = -(-len(specs) // files), {}
    for number in range(files):
        part = specs[number * each : (number + 1) * each]
        file = folder / f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        laid = lay_out(part)
        with file.open("wb") as out:
            out.write(laid.header)
            out.truncate(laid.size)
        names |= {spec.name: file.name for spec in part}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return sum(spec.nbytes for spec in specs)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "files", "least"), [(KIMI_K2, 64, 2.0e12),
                                                        (QWEN3_235B, 118, 4.6e11)],
                         ids=["Kimi-K2", "Qwen3-235B-A22B"])  # fmt: skip
def test_the_plan_of_the_largest_models_fits(tmp_path, config, files, least):
    size = write_sparse(tmp_path, config, files)
    assert size > least
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_incoming(LocalFiles(tmp_path), ConvertOptions(jobs=2)).plan
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(edge.nbytes for edge in plan.edges.values()) >= size
    assert plan.memory_budget < GIB
    assert grown < 2 * GIB
    # No chunk waits for another: all but norms go straight to their places.
    assert plan.estimate.scratch_bytes < 2**22
