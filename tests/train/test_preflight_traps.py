"""Every trap fires where it should, stays silent where it should, and what it mends is mended."""

import json
from dataclasses import replace

import pytest
from moeconv_train import recipe
from moeconv_train.preflight.target import Target
from moeconv_train.preflight.traps import TRAPS, find
from plan_lab import planned

H200 = Target("1xH200", 1, (9, 0))

# Trap: what leads into it from the recipe, and the same setting where it does no harm.
ON_H200 = ("target=H200", "ici_data_parallelism=1")
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vocabulary": (("vocab_size=128000",), ("vocab_size=128512",)),
    "layer cycle": (
        ("decoder_block=mixtral", "interleave_moe_layer_step=1"),
        ("decoder_block=mixtral", "inhomogeneous_layer_cycle_interval=1"),
    ),
    "interleaving": (
        ("decoder_block=mixtral", "inhomogeneous_layer_cycle_interval=1"),
        ("decoder_block=envy",),
    ),
    "bfloat16": (("dtype=bfloat16",), ("dtype=bfloat16", *ON_H200)),
    "loss scaling": (
        ("run.loss_scale.mode=off",),
        ("run.loss_scale.mode=off", "dtype=float32"),
    ),
    "weights in 16 bits": (("weight_dtype=float16",), ("mu_dtype=float32",)),
    "half precision": (("float32_logits=false",), ("float32_logits=false", "dtype=float32")),
    "attention kernel": (("attention=flash",), ("attention=flash", *ON_H200)),
    "sparse matmul": (("sparse_matmul=true",), ("sparse_matmul=true", *ON_H200)),
    "compiler flags": (("compile_xla_flags=--xla_x=true",), ("compile_xla_flags=",)),
    "remat": (("remat_policy=none",), ("remat_policy=minimal",)),
    "data parallel": (
        ("ici_data_parallelism=1", "ici_fsdp_parallelism=-1"),
        ("ici_data_parallelism=1", "ici_fsdp_parallelism=2"),
    ),
    "mesh": (("ici_data_parallelism=4",), ON_H200),
    "not resumable": (("dataset_type=hf",), ("dataset_type=synthetic",)),
    "steps": (("steps=57701",), ("steps=57700",)),
    "pad id": (("dataset_type=hf", "tokenizer_path={tokenizer}"), ("tokenizer_path={tokenizer}",)),
    "checkpoints kept": (
        ("max_num_checkpoints_to_keep=None",),
        ("max_num_checkpoints_to_keep=none", "enable_checkpointing=false"),
    ),
}
# Allowed to fire together with the trap that is tested.
BESIDES = {"pad id": {"not resumable"}}


@pytest.fixture
def case(tokenizer, tmp_path):
    """The recipe on two T4s, with data of 57,700 batches, changed."""
    # Without a pad token MaxText masks id 0, whatever that is.
    for file in tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    keys = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del keys["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))

    def make(words):
        target = H200 if ON_H200[0] in words else None
        words = [word.format(tokenizer=tmp_path) for word in words if word != ON_H200[0]]
        return replace(planned(*words, found=target), available=57_700)

    return make


@pytest.mark.parametrize("name", recipe.recipes())
def test_a_recipe_is_in_no_trap(name):
    assert find(planned(name)) == []


def test_every_trap_is_tested():
    assert [trap.name for trap in TRAPS] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_trap_fires_alone_and_only_where_it_should(case, name):
    into, past = CASES[name]
    found = {finding.check: finding for finding in find(case(into))}
    assert set(found) - BESIDES.get(name, set()) == {name}
    assert name not in {finding.check for finding in find(case(past))}
    message = found[name].message
    assert message[-1] in ".:" and "{" not in message and "\n" not in message
    # One sentence, which names the key that is wrong.
    named = [word for word in into if word.partition("=")[0] in message]
    assert named or name == "pad id", message


@pytest.mark.parametrize("name", [trap.name for trap in TRAPS if trap.status == "mended"])
def test_what_is_mended_is_out_of_the_trap(case, name):
    plan = case(CASES[name][0])
    mended = {finding.check: finding for finding in find(plan)}[name].mended
    assert mended
    assert name not in {finding.check for finding in find(replace(plan, mended=mended))}


def test_all_of_fp16_that_is_not_precise_is_mended(case):
    precise = ["float32_gate_logits", "float32_weight_sum", "cast_logits_to_fp32"]
    words = [f"{key}=false" for key in precise]
    (finding,) = find(case(words))
    assert finding.mended == dict.fromkeys(precise, True)
    dense = case([*words, "num_experts=1", "num_experts_per_tok=1"])
    assert find(dense)[0].mended == {"cast_logits_to_fp32": True}


def test_a_tpu_kernel_is_left_out_on_every_gpu(case):
    both = ["megablox=true", "sparse_matmul=true"]
    (old,), (new,) = find(case(both)), find(case([*both, *ON_H200]))
    assert old.mended == {"megablox": False, "sparse_matmul": False}
    assert new.mended == {"megablox": False, "sparse_matmul": True}


def test_the_default_mesh_becomes_data_parallel(case):
    (finding,) = find(case(["ici_data_parallelism=1", "ici_fsdp_parallelism=-1"]))
    assert finding.mended == {"ici_data_parallelism": 2, "ici_fsdp_parallelism": 1}


@pytest.mark.parametrize("value", ["none", "None", ""])
def test_the_word_none_is_read_as_maxtext_reads_it(case, value):
    config = case([f"remat_policy={value}"]).config
    assert config["remat_policy"] == (None if value else "")


def test_values_from_the_command_line():
    words = {"learning_rate": "1e-5", "steps": "100", "megablox": "false", "run_name": "7b"}
    config = planned(*(f"{key}={value}" for key, value in words.items())).config
    assert [config[key] for key in words] == [1e-5, 100, False, "7b"]


def test_the_tokenizer_is_read_where_it_is_local(tokenizer):
    words = ["dataset_type=hf", f"tokenizer_path={tokenizer}"]
    assert [finding.check for finding in find(planned(*words))] == ["not resumable"]
    (wrong, _) = find(planned(*words, "vocab_size=99"))
    assert wrong.check == "vocabulary" and "BOS and EOS among them" in wrong.message


def test_maxtexts_own_llama3_ranks_are_known():
    words = ["dataset_type=hf", "tokenizer_path=assets/tokenizer_llama3.tiktoken"]
    (wrong, _) = find(planned(*words, "vocab_size=128000"))
    assert "which has 128256, BOS and EOS" in wrong.message
    # Of data that MaxText reads by itself nothing is assumed.
    assert find(planned("dataset_type=synthetic", "vocab_size=1000")) == []
