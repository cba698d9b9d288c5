"""A config.json is read whole: what MaxText does not compute, and what nobody knows, is refused."""

import json

import pytest
import synthetic
from incoming_lab import BLOCKS, converted

from moeconv.conversion.described import describe
from moeconv.errors import MoeconvError, UnsupportedError
from moeconv.families import targets
from moeconv.hf.config import model_config
from moeconv.mapping.reading import ROPE_KEYS
from moeconv.mapping.rules import Options

_WHERE = "config.json"
# Of published models, as their config.json says it.
PUBLISHED = {
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.X"},
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                         "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
        "v_head_dim": 128, "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn",
                         "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
        "use_cache": True, "vocab_size": 201088,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name):
    """And the page writes it again, so that nothing of it is lost."""
    config = PUBLISHED[name]
    found = describe(config, _WHERE)
    assert found.model.num_hidden_layers == config["num_hidden_layers"]
    again = describe(model_config(found.page, found.model, "bfloat16", Options()), _WHERE)
    assert again.model == found.model


@pytest.fixture(scope="module", params=BLOCKS)
def written(request, tmp_path_factory):
    """The config.json that each block's model has."""
    folder = tmp_path_factory.mktemp(request.param)
    ckpt = synthetic.write(folder / "run", request.param, tied=False)
    out = converted(ckpt.run, folder / "out", "--config", ckpt.config_file())
    return json.loads((out / "config.json").read_text())


def _other(value):
    """A value that means something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return value + "_other"
    if isinstance(value, list):
        return [*value[1:], _other(value[0])] if value else [1]
    if value is None:
        return 7
    if all(isinstance(each, dict) for each in value.values()):
        return {kind: {**each, "rope_theta": 77.0} for kind, each in value.items()}
    return {**value, "factor": 77.0, "rope_type": "linear"}


def test_no_key_is_passed_over(written):
    """Each key that is changed is refused, changes the model, or is one that nothing computes."""
    page = next(p for p in targets().values() if p.architecture == written["architectures"][0])
    before = describe(written, _WHERE).model
    unread = page.reading.ignored | {
        "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
        "initializer_range", "max_window_layers", "model_type", "output_router_logits",
        "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise", "torch_dtype",
        "transformers_version", "use_cache", "architectures",
        # Two spellings of RoPE, of which the newer is read where both are there.
        *(ROPE_KEYS - {"rope_parameters"}),
    }  # fmt: skip
    for key in written.keys() - unread:
        try:
            after = describe({**written, key: _other(written[key])}, _WHERE).model
        except MoeconvError:
            continue  # it is refused
        assert after != before, key


def test_an_unknown_key_is_refused_unless_it_is_accepted(written):
    with pytest.raises(UnsupportedError, match="--accept-key warp_factor"):
        describe({**written, "warp_factor": 9}, _WHERE)
    found = describe({**written, "warp_factor": 9}, _WHERE, accept=["warp_factor"])
    assert any("warp_factor" in note for note in found.notes)


def test_what_is_left_out_means_what_transformers_takes_for_it():
    """The defaults of transformers count, and what it derives of other keys."""
    kept = {k: v for k, v in PUBLISHED["llama-3.1-8b"].items()
            if k not in ("attention_bias", "mlp_bias", "rope_scaling", "rope_theta")}  # fmt: skip
    with pytest.raises(UnsupportedError, match="attention_bias is True"):
        describe({**kept, "attention_bias": True}, _WHERE)
    found = describe(kept, _WHERE).model
    assert found.head_dim == 128
    assert (found.rope_type, found.rope_theta) == ("default", 10000.0)
