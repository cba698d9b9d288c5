"""The recipes are what stock MaxText accepts, and the reference run's every number."""

import math
from pathlib import Path

import pytest
from moeconv_train.preflight.config import maxtext_defaults
from moeconv_train.recipe import read_config

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
DEFAULT = "llama3_moe_200m_tinystories.yml"
ALL_MOE = "llama3_moe_200m_tinystories_all_moe.yml"

# Of MaxText's own abstract model.
PARAMETERS = {DEFAULT: 303_787_776, ALL_MOE: 452_441_856}

REFERENCE = {
    "num_decoder_layers": 6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "emb_dim": 768,
    "num_query_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 64,
    "mlp_dim": 3072,
    "moe_mlp_dim": 3072,
    "vocab_size": 128_256,
    "logits_via_embedding": True,
    "rope_max_timescale": 500_000,
    "rope_type": "default",
    "max_target_length": 2048,
    "num_epoch": 2,
    "per_device_batch_size": 4,
    "dtype": "float16",
    "weight_dtype": "float32",
    "opt_type": "adamw",
    "learning_rate": 3e-5,
    "lr_schedule_type": "cosine",
    "warmup_steps_fraction": 0.1,
    "learning_rate_final_fraction": 0.3,
    "adam_weight_decay": 0.1,
    "gradient_clipping_threshold": 1.0,
    "gradient_accumulation_steps": 1,
    "dropout_rate": 0.0,
    "checkpoint_period": 200,
    "max_num_checkpoints_to_keep": 2,
    "save_checkpoint_on_start": False,
    "data_shuffle_seed": 0,
    "init_weights_seed": 0,
    "enable_data_shuffling": True,
    "ici_data_parallelism": 2,
    "ici_fsdp_parallelism": 1,
    "capacity_factor": -1.0,
    "load_balance_loss_weight": 0.01,
}


def plain(value: object) -> object:
    return getattr(value, "value", value if isinstance(value, (bool, int, float)) else str(value))


@pytest.fixture(scope="module")
def configs(maxtext_lab, tmp_path_factory):
    """Both recipes through MaxText's own reading of its command line."""
    from maxtext.configs import pyconfig
    from maxtext_lab import _quiet

    made = {}
    for name in PARAMETERS:
        argv = [
            "",
            str(CONFIGS / name),
            f"base_output_directory={tmp_path_factory.mktemp('runs')}",
            "tokenizer_path=tokenizer",
            "grain_train_files=train-*.array_record",
            "grain_eval_files=validation-*.array_record",
        ]
        with _quiet():
            made[name] = pyconfig.initialize(argv)
    return made


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_number_of_the_reference_run(configs, name):
    keys = configs[name].get_keys()
    assert {key: plain(keys[key]) for key in REFERENCE} == REFERENCE


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_of_maxtexts_abstract_model(configs, name):
    import jax
    from flax import nnx
    from maxtext.utils import maxtext_utils, model_creation_utils
    from maxtext_lab import _quiet

    config = configs[name]
    with _quiet():
        mesh = maxtext_utils.get_mesh_from_config(config, jax.devices()[:2])
        _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes = {".".join(map(str, path)): value.get_value().shape for path, value in state}
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[name]

    moe = {int(key.split("_")[1].split(".")[0]) for key in layers(shapes) if "MoeBlock" in key}
    assert moe == ({1, 3, 5} if name == DEFAULT else set(range(6)))
    assert not any("logits_dense" in key for key in shapes)  # tied


def layers(shapes: dict) -> list[str]:
    """Names from `layers_N` on."""
    return [key[key.index("layers_") :] for key in shapes if "layers_" in key]


def test_the_recipes_differ_only_in_the_architecture_and_what_it_needs():
    default, all_moe = (read_config(CONFIGS / name) for name in PARAMETERS)
    keys = {key for key in default | all_moe if default.get(key) != all_moe.get(key)}
    assert keys <= {
        "run_name",
        "decoder_block",
        "interleave_moe_layer_step",
        "inhomogeneous_layer_cycle_interval",
        "use_qk_norm",
        "use_post_ffw_norm",
        "num_vocab_tiling",
        "remat_policy",
    }
    assert (default["decoder_block"], all_moe["decoder_block"]) == ("envy", "mixtral")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_is_maxtexts_alone_and_names_no_machine(name):
    recipe = read_config(CONFIGS / name)
    assert set(recipe) <= set(maxtext_defaults())
    assert not any(isinstance(value, str) and value.startswith("/") for value in recipe.values())
