"""A converted config of a size that MaxText ships agrees with its own `hf_model_configs.py`."""

import importlib.util

import pytest
import synthetic

from moeconv.arch.config_sources import resolve_config
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.layout import build_layout
from moeconv.arch.parameters import LayerKind
from moeconv.arch.resolve import resolve
from moeconv.families import blocks, target_for
from moeconv.hf.config import model_config
from moeconv.mapping.rules import Options

pytestmark = [pytest.mark.slow, pytest.mark.proof("released configs")]
# No function of weights and tokens depends on them.
_ASIDE = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
    *("router_aux_loss_coef", "output_router_logits", "max_window_layers"),
    "rope_scaling",  # what transformers 5 makes of it is in rope_parameters
}
# Of Gemma (docs/families.md) the table has other thetas and another GELU than MaxText computes, and
# published tables of other lengths.
GEMMA3 = {"max_position_embeddings", "hidden_activation", "rope_parameters"}
GEMMA2 = {"max_position_embeddings", "vocab_size"}
# What differs: the context, which is the run's own, and OLMo 3's YaRN, which MaxText computes
# (configs/models/olmo3-7b.yml) and its table leaves out (docs/families.md).
APART = {
    "gpt-oss-20b": set(),
    "gpt-oss-120b": set(),
    "olmo3-7b": {"max_position_embeddings", "rope_parameters"},
    "olmo3-32b": {"max_position_embeddings", "rope_parameters"},
    "qwen3-next-80b-a3b": {"max_position_embeddings", "intermediate_size"},  # of dense layers
    "gemma3-4b": GEMMA3,
    "gemma3-12b": GEMMA3,
    "gemma3-27b": GEMMA3,
    "gemma2-2b": GEMMA2,
    "gemma2-9b": GEMMA2 | {"query_pre_attn_scalar"},
    "gemma2-27b": GEMMA2 | {"query_pre_attn_scalar"},
    "mixtral-8x7b": {"max_position_embeddings"},
    "llama3.1-8b": {"max_position_embeddings"},
    # The table's is of a model with images, between whose tokens attention goes both ways.
    "gemma4-26b": {"max_position_embeddings", "use_bidirectional_attention"},
    # The width of experts that it has not.
    "gemma4-31b": {
        *("max_position_embeddings", "use_bidirectional_attention"),
        "moe_intermediate_size",
    },
}


def theirs(name):
    """The config in MaxText's table, which needs no MaxText to be read."""
    spec = importlib.util.find_spec("maxtext")
    file = f"{spec.submodule_search_locations[0]}/checkpoint_conversion/utils/hf_model_configs.py"
    spec = importlib.util.spec_from_file_location("hf_model_configs", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.HF_MODEL_CONFIGS[name]
    return getattr(found, "text_config", found)


def linear(value, sizes):
    """The axes of linear attention."""
    keys, heads, head = (
        value["gdn_num_key_heads"] * value["gdn_key_head_dim"],
        value["gdn_num_value_heads"],
        value["gdn_value_head_dim"],
    )
    values = heads * head
    return {
        **{"O": sizes["n"], "Q": 2 * sizes["h"], "u": 1, "t": 4},  # gdn_conv_kernel_dim
        **{"w": heads, "d": head, "W": values, "y": 2 * heads},
        **{"C": 2 * keys + values, "Z": 2 * keys + 2 * values},
    }


def ours(name):
    """The config.json of a checkpoint with the shapes that the model's file asks for."""
    told = resolve_config({"model_name": name}, Provenance(Origin.CONFIG, "run.yml"), ())
    value = {key: one.value for key, one in told.items()}
    block = blocks()[value["decoder_block"]]
    heads, kv, width = (value[f"base_{k}"] for k in ("num_query_heads", "num_kv_heads", "emb_dim"))
    head = value["head_dim"]
    sizes = {
        **{"V": value["vocab_size"], "D": width, "H": heads, "K": kv, "h": head},
        **{"F": value["base_mlp_dim"], "M": value["base_mlp_dim"], "E": value["num_experts"]},
        **{"n": heads * head, "m": kv * head, "u": 1},
        **{"J": value["global_num_kv_heads"], "j": value["global_head_dim"]},
    }
    if block.name in synthetic.LAST:
        sizes |= linear(value, sizes)
    way = next(way for way in block.stackings if not way.scanned)
    depth = value["base_num_decoder_layers"] * way.paired
    kinds = list(block.layers)[:1] * depth
    if block.name in synthetic.LAST:
        cycle = value["inhomogeneous_layer_cycle_interval"]
        other, last = map(LayerKind, synthetic.LAST[block.name])
        kinds = [*[other] * (cycle - 1), last] * (depth // cycle)
    if pattern := synthetic.PATTERNS.get(block.name):
        half = "moe" if value["num_experts"] > 1 else "dense"
        kinds = [LayerKind(kind.replace("moe", half)) for kind in pattern] * (depth // len(pattern))
        sizes["M"] = value["base_moe_mlp_dim"]
    tied = bool(value["logits_via_embedding"])
    layout = build_layout(block, way, kinds, sizes, blocks=[(depth, 1)], tied=tied)
    model = resolve(layout, told).model()
    return model_config(target_for(model), model, "bfloat16", Options())


def sizes_of_layers(config):
    """Of every layer, where they differ; what is asked of the config then is that of the others."""
    if not getattr(config, "is_heterogeneous", False):
        return None
    config.allow_global_per_layer_attribute_access = True
    return [(layer.head_dim, layer.num_key_value_heads) for layer in config.per_layer_config]


@pytest.mark.parametrize("name", APART)
def test_the_configs_agree_on_what_decides_the_function(name):
    from transformers import AutoConfig

    written = ours(name)
    read, table = AutoConfig.for_model(**written), theirs(name)
    assert read.model_type == table.model_type
    assert sizes_of_layers(read) == sizes_of_layers(table)
    told = {key for key in written if getattr(table, key, None) is not None} - _ASIDE
    assert {"hidden_size", "rope_parameters", "rms_norm_eps"} <= told
    found = {key: (getattr(read, key), getattr(table, key)) for key in told}
    differ = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    assert differ.keys() == APART[name], differ
