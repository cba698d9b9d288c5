"""Every trap fires where it should, stays silent where it should, and what it mends is mended."""

import json
from pathlib import Path

import pytest
from moeconv_train.preflight import LOCAL, T4X2, RunSettings, Target
from moeconv_train.preflight.case import Case
from moeconv_train.preflight.traps import TRAPS, find
from moeconv_train.recipe import read_config

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
RECIPE = read_config(CONFIGS / "llama3_moe_200m_tinystories.yml")
KNOWN = RunSettings(tokenizer_size=128_256, pad_id=-1, batches=57_700)
H200 = Target("1xH200", 1, (9, 0), 141 * 10**9)

# Trap: what leads into it from the recipe (settings, known, target, environment), and the same
# setting where it does no harm.
ON_H200 = {"target": H200, "ici_data_parallelism": 1}
CASES: dict[str, tuple[dict, dict]] = {
    "vocabulary": ({"vocab_size": 128_000}, {"vocab_size": 128_512}),
    "layer cycle": (
        {"decoder_block": "mixtral", "interleave_moe_layer_step": 1},
        {"decoder_block": "mixtral", "inhomogeneous_layer_cycle_interval": 1},
    ),
    "interleaving": (
        {"decoder_block": "mixtral", "inhomogeneous_layer_cycle_interval": 1},
        {"decoder_block": "envy"},
    ),
    "token dropping": ({"capacity_factor": 1.25}, {"capacity_factor": -1.0}),
    "bfloat16": ({"dtype": "bfloat16"}, {"dtype": "bfloat16", **ON_H200}),
    "loss scaling": ({"loss_scaling": False}, {"loss_scaling": False, "dtype": "float32"}),
    "weights in 16 bits": ({"weight_dtype": "float16"}, {"mu_dtype": "float32"}),
    "spikes": (
        {"skip_step_on_spikes": "true"},
        {"skip_step_on_spikes": "true", "dtype": "float32"},
    ),
    "attention sums": (
        {"float32_logits": False},
        {"float32_logits": False, "dtype": "float32"},
    ),
    "router": ({"float32_gate_logits": False}, {"float32_gate_logits": False, "num_experts": 1}),
    "logits": (
        {"cast_logits_to_fp32": False},
        {"cast_logits_to_fp32": False, "dtype": "float32"},
    ),
    "expert sums": ({"float32_weight_sum": False}, {"float32_weight_sum": False, "num_experts": 1}),
    "attention kernel": ({"attention": "flash"}, {"attention": "flash", **ON_H200}),
    "megablox": ({"megablox": True, "sparse_matmul": True}, {"megablox": True}),
    "sparse matmul": ({"sparse_matmul": True}, {"sparse_matmul": True, **ON_H200}),
    "tokamax": ({"use_tokamax_gmm": True}, {"use_tokamax_gmm": True, **ON_H200}),
    "remat": ({"remat_policy": "none"}, {"remat_policy": "minimal"}),
    "scanned layers": ({"scan_layers": True}, {"scan_layers": True, **ON_H200}),
    "data parallel": (
        {"ici_data_parallelism": 1, "ici_fsdp_parallelism": -1},
        {"ici_data_parallelism": 1, "ici_fsdp_parallelism": 2},
    ),
    "mesh": ({"ici_data_parallelism": 4}, {"ici_data_parallelism": 1, "target": H200}),
    "not resumable": (
        {"dataset_type": "hf", "hf_path": "roneneldan/TinyStories"},
        {"dataset_type": "synthetic"},
    ),
    "steps": ({"steps": 57_701}, {"steps": 57_700}),
    "schedule": ({"learning_rate_schedule_steps": 50_000}, {"learning_rate_schedule_steps": -1}),
    "pad id": ({"pad_id": 0}, {"pad_id": 0, "own_pipeline": True}),
    "checkpoints kept": (
        {"max_num_checkpoints_to_keep": "None"},
        {"max_num_checkpoints_to_keep": None, "enable_checkpointing": False},
    ),
    "first checkpoint": ({"save_checkpoint_on_start": True}, {"save_checkpoint_on_start": "false"}),
    "bf16 export": ({"force_unroll": True}, {"force_unroll": False}),
    "metrics": ({"metrics_file": "m.jsonl"}, {"metrics_file": "m.jsonl", "eval_interval": -1}),
    "no evaluation": ({"eval_interval": -1}, {"eval_interval": 10}),
    "decoupled": ({"DECOUPLE_GCLOUD": "TRUE"}, {"DECOUPLE_GCLOUD": "FALSE"}),
}
# Allowed to fire together with the trap that is tested.
BESIDES = {
    "layer cycle": set(),
    "megablox": {"sparse matmul"},
    "bfloat16": set(),
}


def case(changes: dict) -> Case:
    """The recipe on two T4s with everything known, changed."""
    changes = dict(changes)
    target = changes.pop("target", T4X2)
    environment = {k: changes.pop(k) for k in list(changes) if k.isupper()}
    fields = RunSettings.__dataclass_fields__
    known = {k: changes.pop(k) for k in list(changes) if k in fields}
    settings = RunSettings(**{**vars(KNOWN), **known})
    found = Case.of({**RECIPE, **changes}, settings, target)
    return Case(found.config, settings, target, environment)


def test_the_recipe_is_in_no_trap():
    assert find(case({})) == []


def test_every_trap_is_tested():
    assert [trap.name for trap in TRAPS] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_trap_fires_alone_and_only_where_it_should(name):
    into, past = CASES[name]
    found = {finding.check: finding for finding in find(case(into))}
    assert set(found) - BESIDES.get(name, set()) == {name}
    assert name not in {finding.check for finding in find(case(past))}
    message = found[name].message
    assert message[-1] in ".:" and "{" not in message and "\n" not in message
    # One sentence, which names the key that is wrong.
    named = [key for key in into if key in message]
    assert named or name in ("loss scaling", "pad id"), message


@pytest.mark.parametrize("name", [t.name for t in TRAPS if t.severity == "mend"])
def test_what_is_mended_is_out_of_the_trap(name):
    into, _ = CASES[name]
    trap = next(trap for trap in TRAPS if trap.name == name)
    mended = trap.finding(case(into)).mended
    assert mended
    assert name not in {finding.check for finding in find(case({**into, **mended}))}


def test_the_default_mesh_becomes_data_parallel():
    changes = {"ici_data_parallelism": 1, "ici_fsdp_parallelism": -1}
    (finding,) = find(case(changes))
    assert finding.mended == {"ici_data_parallelism": 2, "ici_fsdp_parallelism": 1}


def test_nothing_is_said_of_devices_that_are_not_known():
    assert find(case({"target": LOCAL, "ici_data_parallelism": 4})) == []


@pytest.mark.parametrize("value", ["none", "None", None])
def test_the_word_none_is_read_as_maxtext_reads_it(value):
    assert case({"remat_policy": value})["remat_policy"] is None


def test_values_from_the_command_line():
    found = case({"learning_rate": "1e-5", "steps": "100", "megablox": "false", "run_name": "7b"})
    keys = ("learning_rate", "steps", "megablox", "run_name")
    assert [found[key] for key in keys] == [1e-5, 100, False, "7b"]


def test_the_tokenizer_is_read_where_it_is_local(tmp_path):
    from moeconv_train.tokenizer import PAD, save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["once upon a time"] * 3, 300)
    save_tokenizer(tokenizer, tmp_path)
    given = {"tokenizer_path": str(tmp_path), "tokenizer_size": None, "pad_id": None}
    found = case({**given, "vocab_size": 256})
    assert found.tokenizer_size == tokenizer.get_vocab_size()
    assert found.pad_id == tokenizer.token_to_id(PAD)
    assert [finding.check for finding in find(found)] == ["vocabulary"]

    # Without a pad token MaxText masks id 0, whatever that is.
    config = tmp_path / "tokenizer_config.json"
    keys = json.loads(config.read_text())
    del keys["pad_token"]
    config.write_text(json.dumps(keys))
    assert [finding.check for finding in find(case(given))] == ["pad id"]


def test_maxtexts_own_llama3_ranks_are_known():
    given = {"tokenizer_type": "tiktoken", "tokenizer_path": "assets/tokenizer_llama3.tiktoken"}
    found = case({**given, "tokenizer_size": None, "pad_id": None, "vocab_size": 128_000})
    assert (found.tokenizer_size, found.pad_id) == (128_256, -1)
    assert [finding.check for finding in find(found)] == ["vocabulary"]
