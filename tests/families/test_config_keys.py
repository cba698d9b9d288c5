"""Every page writes the keys of config.json that vLLM, SGLang and llama.cpp read.

The keys are those that their code reads for the architecture without a default of its own that
would be right: vllm/model_executor/models, sglang/srt/models, llama.cpp/conversion (main branches
of 2026). transformers and mlx-lm are run instead (tests/consumers).
"""

from functools import cache

import numpy as np
import pytest
import synthetic
from checkpoints import ROWS

from moeconv.conversion.api import ConvertOptions, plan_conversion
from moeconv.families import blocks, targets
from moeconv.hf.config import model_config
from moeconv.mapping.rules import Options

# Of every architecture; `null` is no value of these.
EVERY = (
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"),
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters"),
)
# All but: latent attention has no head_dim; Qwen2 has none of its own; Gemma 4 came with
# `rope_parameters`.
HEAD_DIM = targets().keys() - {"qwen2", "deepseek_v2", "deepseek_v3", "deepseek_v32"}
THETA = targets().keys() - {"gemma4"}
MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
DEEPSEEK = (
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"),
    *("first_k_dense_replace", "moe_layer_freq", "routed_scaling_factor", "n_group", "topk_group"),
    *("scoring_func", "topk_method", "norm_topk_prob", "rope_scaling"),
)
QWEN_MOE = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers"),
)
WINDOWS = ("sliding_window", "layer_types")
OWN = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "qwen3_moe": QWEN_MOE,
    "qwen3_next": (
        *QWEN_MOE,
        *("shared_expert_intermediate_size", "layer_types", "full_attention_interval"),
        *("linear_conv_kernel_dim", "linear_num_key_heads", "linear_key_head_dim"),
        *("linear_num_value_heads", "linear_value_head_dim", "partial_rotary_factor"),
    ),
    "gpt_oss": (*WINDOWS, "num_local_experts", "num_experts_per_tok", "swiglu_limit"),
    "llama4": (
        *("num_local_experts", "num_experts_per_tok", "intermediate_size_mlp", "layer_types"),
        *("interleave_moe_layer_step", "moe_layers", "no_rope_layers", "attention_chunk_size"),
        *("attn_temperature_tuning", "floor_scale", "attn_scale", "use_qk_norm"),
    ),
    "ernie4_5_moe": (
        *("moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts"),
        *("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index", "use_bias"),
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": (*DEEPSEEK, *MLA, "index_n_heads", "index_head_dim", "index_topk"),
    "gemma": ("hidden_act", "hidden_activation"),
    "gemma2": (*WINDOWS, "hidden_activation", "query_pre_attn_scalar"),
    "gemma3": (
        *(*WINDOWS, "hidden_activation", "query_pre_attn_scalar"),
        *("sliding_window_pattern", "rope_local_base_freq"),
    ),
    "gemma4": (
        *(*WINDOWS, "hidden_activation", "global_head_dim", "num_global_key_value_heads"),
        *("attention_k_eq_v", "enable_moe_block", "num_experts", "top_k_experts"),
        *("hidden_size_per_layer_input", "num_kv_shared_layers"),
    ),
    "olmo3": WINDOWS,
}
# Keys that are read though they are null: without them a default would be taken.
NULL = {
    "mistral": ("sliding_window",),
    "mixtral": ("sliding_window",),
    "qwen2": ("sliding_window",),
    "qwen3": ("sliding_window",),
    "qwen3_moe": ("sliding_window",),
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma4": ("final_logit_softcapping",),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts")


def with_norms(arrays):
    """QK norms in every layer, as in `qwen3`."""
    for name in [name for name in arrays if name.endswith("self_attention.query.kernel")]:
        shape = (4, *arrays[name].shape[1:2]) if arrays[name].ndim == 4 else (4,)
        for part in ("query_norm", "key_norm"):
            arrays[name.replace("query.kernel", f"{part}.scale")] = np.ones(shape, np.float32)


def without_bias(arrays):
    for name in [name for name in arrays if name.endswith("gate.bias")]:
        del arrays[name]


def with_indexer(arrays):
    """As of `use_indexer`, unscanned."""
    for name in [name for name in arrays if name.endswith("self_attention.wq_b.kernel")]:
        place = name.removesuffix("wq_b.kernel") + "indexer."
        shapes = {"wq_b.kernel": (11, 3, 6), "wk.kernel": (16, 6), "weights_proj.kernel": (16, 3)}
        for part, shape in {**shapes, "k_norm.scale": (6,), "k_norm.bias": (6,)}.items():
            arrays[place + part] = np.ones(shape, np.float32)


# Targets that no checkpoint of the table has by default: the block, its change, and the config's.
SOFTMAX = {"routed_score_func": "softmax", "routed_bias": False, "model_name": "deepseek2-16b"}
CHANGED = {
    "ernie4_5_moe": ("envy", lambda arrays: None, {}),
    "deepseek_v2": ("deepseek", without_bias, SOFTMAX),
    "deepseek_v32": ("deepseek", with_indexer, {"use_indexer": True}),
    "qwen3_moe-of-envy": ("envy", with_norms, {"use_qk_norm": True}),
}
FIRST = {page.targets[0]: name for name, page in reversed(blocks().items())}
CASES = (*FIRST, *CHANGED)


@cache
def written(folder, case):
    """The config.json of a page, and the model that it is of."""
    block, change, told = CHANGED.get(case) or (FIRST[case], lambda arrays: None, {})
    made = synthetic.write(folder / case, block, change=change, scanned=False)
    options = ConvertOptions(config=made.config_file(**told), target=case.partition("-")[0])
    model = plan_conversion(str(made.run), options).plan.model
    return model_config(targets()[case.partition("-")[0]], model, "bfloat16", Options()), model


@pytest.fixture
def config(tmp_path_factory, request):
    return written(tmp_path_factory.getbasetemp(), request.param)


def test_every_target_has_a_case():
    assert {case.partition("-")[0] for case in CASES} == targets().keys()
    assert {row.architecture for row in ROWS.values()} <= {
        targets()[case.partition("-")[0]].architecture for case in CASES
    }


@pytest.mark.parametrize(("config", "case"), [(case, case) for case in CASES], indirect=["config"])
def test_what_consumers_read_is_there(config, case):
    found, _ = config
    name = case.partition("-")[0]
    wanted = {*EVERY, *OWN.get(name, ()), *(["head_dim"] if name in HEAD_DIM else [])}
    assert {key for key in wanted if found.get(key) is None} == set()
    null = {*NULL.get(name, ()), *(("rope_theta", "rope_scaling") if name in THETA else ())}
    assert null <= found.keys()


@pytest.mark.parametrize(("config", "case"), [(case, case) for case in CASES], indirect=["config"])
def test_one_thing_has_one_value_under_all_its_names(config, case):
    found, model = config
    assert found["torch_dtype"] == found["dtype"] == "bfloat16"
    assert {found[key] for key in EXPERTS if key in found} <= {model.num_experts}
    assert {found[key] for key in CHOSEN if key in found} <= {model.num_experts_per_tok}
    assert found.get("norm_topk_prob", True) is (case != "deepseek_v2")
    rope = found["rope_parameters"]
    thetas = {each["rope_theta"] for each in rope.values() if isinstance(each, dict)}
    thetas |= {rope["rope_theta"]} if "rope_theta" in rope else set()
    assert found.get("rope_theta", model.rope_theta) in thetas
    if (types := found.get("layer_types")) is not None:
        assert len(types) == found["num_hidden_layers"]


@pytest.mark.parametrize("config", ["qwen3_moe-of-envy"], indirect=True)
def test_dense_layers_among_experts_are_named(config):
    found, model = config
    assert found["mlp_only_layers"] == list(model.dense_layers) == [0, 2]
    assert found["decoder_sparse_step"] == 1


def said(tmp_path, block, **told):
    tied, sizes = told.pop("tied", True), told.pop("sizes", None)
    made = synthetic.write(tmp_path / "run", block, tied=tied, sizes=sizes, scanned=False)
    planned = plan_conversion(str(made.run), ConvertOptions(config=made.config_file(**told)))
    return "\n".join(planned.plan.warnings)


@pytest.mark.parametrize(
    ("block", "told", "words"),
    [
        ("gemma", {"rope_max_timescale": 20_000}, "drops rope_theta=20000 of this architecture"),
        ("gemma", {"tied": False}, "drops the output head of this architecture"),
        ("gemma2", {"attn_logits_soft_cap": 0}, "only with both soft caps"),
        ("gemma2", {"sizes": {"L": 46, "h": 6}}, "sqrt(4) in a Gemma of 46 layers"),
        ("gemma3", {"sizes": {"h": 6}, "model_name": "gemma3-27b"}, "sqrt(6) in a Gemma of 4"),
        ("olmo3", {"sizes": {"h": 2, "n": 8, "m": 4}}, "OLMo 3 whose head_dim, 2, is not hidden"),
        ("llama4", {"nope_layer_interval": 3}, "SGLang the first"),
        ("olmo3", {}, "llama.cpp loads no OLMo 3 without an output head"),
        ("gpt_oss", {}, "vLLM loads a GPT-OSS with YaRN only"),
        ("gpt_oss", {"normalization_layer_epsilon": 1e-6}, "vLLM has 1e-05 in every norm"),
        ("llama4", {"temperature_tuning": False, "chunk_attn_window_size": 8192,
                    "nope_layer_interval": 4, "use_qk_norm": True},
         "llama.cpp has its own temperature_tuning for every Llama 4"),
    ],
)  # fmt: skip
def test_what_a_consumer_reads_otherwise_is_said(tmp_path, block, told, words):
    assert words in said(tmp_path, block, **told)


@pytest.mark.parametrize(
    ("block", "told", "words"),
    [
        ("gemma", {"rope_max_timescale": 10_000}, "llama.cpp"),
        ("gemma2", {"rope_max_timescale": 10_000, "attn_logits_soft_cap": 50.0,
                    "final_logits_soft_cap": 30.0}, "llama.cpp"),
        ("olmo3", {"tied": False}, "llama.cpp"),
        ("gpt_oss", {"rope_type": "yarn", "max_position_embeddings": 64}, "vLLM"),
        ("llama4", {"temperature_tuning": True, "chunk_attn_window_size": 8192,
                    "nope_layer_interval": 4, "use_qk_norm": True}, "llama.cpp"),
    ],
)  # fmt: skip
def test_nothing_is_said_where_they_agree(tmp_path, block, told, words):
    assert words not in said(tmp_path, block, **told)
