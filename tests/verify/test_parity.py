"""Levels logits and layers: a right conversion passes, and each mistake fails where it is."""

import json
import shutil

import numpy as np
import pytest
import synthetic
from helpers import config_file, run
from maxtext_lab import ENVY, LLAMA2, MIXTRAL, TIED
from moeconv_train.sidecar import public_config
from safetensors.numpy import load_file, save_file

from moeconv.arch.sidecar import SIDECAR_NAME
from moeconv.convert.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import UnsupportedError, UsageError
from moeconv.hf.safetensors import read_header
from moeconv.verify.described import check_description
from moeconv.verify.grading import HIDDEN, KL, LIMITS
from moeconv.verify.layers import check_layers
from moeconv.verify.logits import check_logits
from moeconv.verify.outcome import Status, worst
from moeconv.verify.reference import reference_config
from moeconv.verify.rounding import Rounding, roundings
from moeconv.verify.routing import compare_routing
from moeconv.verify.run import VerifyOptions, verify
from moeconv.verify.settings import ParityOptions, parse_against
from moeconv.verify.source_layers import LayerReader
from moeconv.verify.subject import Subject
from moeconv.verify.tokens import RANDOM, TEXT, Rows, Sample, make_rows

# One row of the whole context is enough to see every mistake below.
LENGTH = 64


def rows_for(vocab: int) -> Rows:
    tokens = np.random.default_rng(3).integers(0, vocab, (1, LENGTH)).astype(np.int32)
    return Rows(tokens, (RANDOM,), "none")


def check(level, out, options=None):
    function = {"logits": check_logits, "layers": check_layers}[level]
    subject = Subject.open(out)
    rows = rows_for(subject.model.vocab_size)
    found = function(subject, rows, options or ParityOptions(), lambda text: None)
    return {one.name: one for one in found}


@pytest.fixture(scope="module")
def envy(maxtext_lab, tmp_path_factory):
    """Interleaved, tied, with a sidecar: the reference is told by the run, not by us."""
    checkpoint = maxtext_lab.checkpoint(ENVY, TIED)
    root = tmp_path_factory.mktemp("parity")
    shutil.copytree(checkpoint.run_dir, root / "run")
    config = public_config(checkpoint.resolved)
    sidecar = {"format": "moeconv-run", "version": 1, "config": config}
    (root / "run" / SIDECAR_NAME).write_text(json.dumps(sidecar))
    moved = type(checkpoint)(
        run_dir=root / "run",
        step_dir=root / "run" / "checkpoints" / "0",
        config=checkpoint.config,
        resolved=checkpoint.resolved,
        params=checkpoint.params,
    )
    for name, options in {
        "fp32": {},
        "bf16": {"dtype": "bfloat16"},
        "compact": {"target": "ernie4_5_moe"},
    }.items():
        run(moved, root / name, **options)
    return root


@pytest.mark.parametrize("name", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), "compact"])
@pytest.mark.parametrize("level", ["logits", "layers"])
def test_a_right_conversion_passes(envy, name, level):
    found = check(level, envy / name)
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    assert found["reference"].metrics["independent"]
    assert "description" in found
    assert {"parity", "stock", "router"} <= set(found)
    assert ("rounding" in found["parity"].metrics) == (name == "bf16")
    kl = found["parity"].metrics["all"]["kl_max"]
    assert kl < 1e-9 if name != "bf16" else kl > 1e-7
    stock = found["stock"].metrics
    assert stock["head_rounding"]["kl_mean"] > 1e-8, "the tied head does round"
    if level == "layers":
        parts = [(p["layer"], p["part"]) for p in found["hidden"].metrics["places"]]
        assert parts[0] == (None, "embedding") and parts[-1] == (None, "final norm")
        assert (1, "router") in parts and (0, "router") not in parts
    else:
        assert found["greedy"].status is Status.PASS


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((MIXTRAL, TIED, {"scan_layers": False}), marks=pytest.mark.slow),
        pytest.param((MIXTRAL,), marks=pytest.mark.slow),
        pytest.param((LLAMA2,), marks=pytest.mark.slow),
    ],
)
def test_other_blocks_pass_too(maxtext_lab, tmp_path, parts):
    made = maxtext_lab.checkpoint(*parts)
    run(made, tmp_path / "out", untie=True)
    for level in ("logits", "layers"):
        found = check(level, tmp_path / "out")
        reference = found.pop("reference")
        assert reference.status is Status.WARN and "--config" in reference.summary
        assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    found = check(
        "layers", tmp_path / "out", ParityOptions(config=config_file(tmp_path, made.config))
    )
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    assert "description" in found


@pytest.mark.parametrize("name", ["compact", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("level", ["logits", "layers"])
def test_against_another_hugging_face_model(envy, name, level):
    found = check(level, envy / name, ParityOptions(against=envy / "fp32"))
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}


@pytest.mark.slow
def test_computed_in_bfloat16(envy):
    found = check("layers", envy / "fp32", ParityOptions(dtype="bfloat16"))
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    assert found["parity"].metrics["all"]["kl_max"] > 1e-7


# --- mutations: broken in memory maps, so that only the levels under test can see it -------------

ATTENTION = "model.layers.2.self_attn."
MOE = "model.layers.3.block_sparse_moe."


def tensor(out, name):
    spec, offset = read_header(out / "model.safetensors")[name]
    return np.memmap(out / "model.safetensors", np.float32, "r+", offset=offset, shape=spec.shape)


def scale(name, factor):
    def change(out):
        tensor(out, name)[:] *= np.float32(factor)

    return change


def swap(one, other):
    def change(out):
        a, b = tensor(out, one), tensor(out, other)
        a[:], b[:] = b.copy(), a.copy()

    return change


def apply(name, function):
    def change(out):
        values = tensor(out, name)
        values[:] = function(values.copy())

    return change


def edit(**changes):
    def change(out):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | changes))

    return change


def theta(value):
    def change(out):
        config = json.loads((out / "config.json").read_text())
        rope = {**config["rope_parameters"], "rope_theta": value}
        (out / "config.json").write_text(
            json.dumps(config | {"rope_theta": value, "rope_parameters": rope})
        )

    return change


# What is broken, how, and the first place that level layers must name: (layer, words).
MUTATIONS = {
    "query scale missing": (scale(ATTENTION + "q_proj.weight", 0.25), 2, "layer 2 attention"),
    "query scale doubled": (scale(ATTENTION + "q_proj.weight", 4), 2, "layer 2 attention"),
    "logit scale missing": (scale("model.norm.weight", 48**0.5), None, "final norm"),
    "wrong theta": (theta(10_000.0), 0, "layer 0 attention"),
    "wrong epsilon": (edit(rms_norm_eps=1e-2), 0, "layer 0 attention"),
    "w1 and w3 swapped": (
        swap(MOE + "experts.1.w1.weight", MOE + "experts.1.w3.weight"), 3, "layer 3 experts"),
    "two experts swapped": (
        swap(MOE + "experts.0.w2.weight", MOE + "experts.2.w2.weight"), 3, "layer 3 experts"),
    "router columns permuted": (
        apply(MOE + "gate.weight", lambda v: v[::-1]), 3, "layer 3 router"),
    "one layer off": (
        swap("model.layers.0.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        0, "layer 0 attention"),
    "interleave shifted": (
        swap("model.layers.1.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight"),
        1, "layer 1 attention"),
    "query rows permuted within heads": (
        apply(ATTENTION + "q_proj.weight",
              lambda v: v.reshape(4, 2, 8, 48).swapaxes(1, 2).reshape(v.shape)),
        2, "layer 2 attention"),
    "key and value swapped": (
        swap(ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"), 2, "layer 2 attention"),
    "GQA heads misordered": (
        apply(ATTENTION + "k_proj.weight", lambda v: v.reshape(2, 16, 48)[::-1].reshape(v.shape)),
        2, "layer 2 attention"),
    "final norm of another layer": (
        swap("model.norm.weight", "model.layers.3.input_layernorm.weight"), 3, "layer 3 attention"),
    "one expert zeroed": (scale(MOE + "experts.2.w1.weight", 0), 3, "layer 3 experts"),
    "embedding rows shifted": (
        apply("model.embed_tokens.weight", lambda v: np.roll(v, 1, axis=0)), None, "embedding"),
    "top-k wrong": (edit(num_experts_per_tok=1), 1, "layer 1 experts"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mistake_is_found_and_placed(envy, tmp_path, name):
    break_it, layer, words = MUTATIONS[name]
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    break_it(out)
    found = check("layers", out)
    assert found["hidden"].status is Status.FAIL, found["hidden"].summary
    assert found["hidden"].layer == layer
    assert words in found["hidden"].summary
    assert found["parity"].status is Status.FAIL, found["parity"].summary


# Whole models take longer: those that move no weight, and one that does.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["wrong theta", "top-k wrong", "logit scale missing", "one expert zeroed"]
)
def test_level_logits_fails_too(envy, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    MUTATIONS[name][0](out)
    found = check("logits", out)
    assert found["parity"].status is Status.FAIL, found["parity"].summary


def test_a_mistake_is_found_and_placed(envy, tmp_path):
    """One of those below, in every run of the suite."""
    test_every_mistake_is_found_and_placed(envy, tmp_path, "two experts swapped")


@pytest.mark.slow
def test_a_mistake_in_a_rounded_output_is_found(envy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "bf16", out)
    theta(10_000.0)(out)
    found = check("layers", out)
    assert (found["hidden"].status, found["hidden"].layer) == (Status.FAIL, 0)
    assert found["parity"].status is Status.FAIL


def test_models_that_cannot_be_compared_do_not_hide_what_has_failed(envy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    apply("model.embed_tokens.weight", lambda v: v * np.nan)(out)
    report = verify(out, source=None, options=VerifyOptions(levels=("structure", "logits")))
    assert report.verdict is Status.FAIL
    assert report.levels == {"structure": Status.FAIL, "logits": Status.SKIP}
    assert "not all finite" in report.checks[-1].summary


# --- what logits cannot show ----------------------------------------------------------------------

# What the conversion was told by a flag over the run's config; the verdict; words of it.
TOLD = {
    "epsilon": (
        "normalization_layer_epsilon=1e-6",
        Status.FAIL,
        "rms_norm_eps is 1e-06 in the output (flag: --set normalization_layer_epsilon=1e-6), but "
        "1e-05 in the run (config file: ",
    ),
    "context": (
        "max_target_length=4096",
        Status.WARN,
        "max_position_embeddings is 4096 in the output (flag: --set max_target_length=4096), but "
        "64 in the run (config file: ",
    ),
    "top-k": ("num_experts_per_tok=1", Status.FAIL, "num_experts_per_tok is 1 in the output"),
    "a default": ("rope_type=llama3.1", Status.WARN, "rope_type is llama3.1 in the output"),
    "nothing new": ("num_experts_per_tok=2", Status.PASS, "fields of the output's description"),
}


def described(out, config=None):
    subject = Subject.open(out)
    return check_description(
        "layers", subject, reference_config(subject.model, subject.layout, subject.step, config)
    )


@pytest.mark.parametrize("name", TOLD)
def test_what_the_conversion_was_told_is_held_against_the_run(tmp_path, name):
    flag, status, words = TOLD[name]
    made = synthetic.write(tmp_path / "run")
    config = made.config_file(normalization_layer_epsilon=1e-5)
    options = ConvertOptions(config=config, sets=(flag,))
    convert(plan_conversion(str(made.run), options), tmp_path / "out")
    (found,) = described(tmp_path / "out", config)
    assert found.status is status
    assert words in found.summary
    assert len(found.metrics) == (status is not Status.PASS)
    assert described(tmp_path / "out") == [], "nobody else tells of the run"


def test_a_flag_may_fill_what_the_config_leaves_open(tmp_path):
    made = synthetic.write(tmp_path / "run")
    config = made.config_file(rope_max_timescale=None, decoder_block=None)
    flags = ("rope_max_timescale=7e5", "decoder_block=mixtral")
    options = ConvertOptions(config=config, sets=flags)
    convert(plan_conversion(str(made.run), options), tmp_path / "out")
    (found,) = described(tmp_path / "out", config)
    assert found.status is Status.WARN
    assert set(found.metrics) == {"rope_theta", "decoder_block"}
    other = made.config_file(tmp_path, rope_max_timescale=7e5)
    assert described(tmp_path / "out", other)[0].status is Status.PASS


def test_a_description_told_by_another_config_fails(tmp_path):
    """Also where the run leaves a field to MaxText's default: the reference is built of that."""
    made = synthetic.write(tmp_path / "run")
    wrong = made.config_file(tmp_path, normalization_layer_epsilon=1e-6)
    convert(plan_conversion(str(made.run), ConvertOptions(config=wrong)), tmp_path / "out")
    (found,) = described(tmp_path / "out", made.config_file())
    assert found.status is Status.FAIL
    assert "in the run (MaxText default: " in found.summary


def test_a_sidecar_is_held_against_the_output_in_a_level(envy, tmp_path):
    sets = ("normalization_layer_epsilon=1e-6", "max_target_length=128")
    options = ConvertOptions(sets=sets)
    convert(plan_conversion(str(envy / "run"), options), tmp_path / "out")
    found = check("layers", tmp_path / "out")
    assert found["description"].status is Status.FAIL
    assert found["description"].summary.startswith("rms_norm_eps is 1e-06")
    assert "max_position_embeddings" in found["description"].summary


@pytest.mark.parametrize("level", ["logits", "layers"])
def test_a_config_of_another_model_is_no_reference(tmp_path, level):
    made = synthetic.write(tmp_path / "run")
    options = ConvertOptions(config=made.config_file())
    convert(plan_conversion(str(made.run), options), tmp_path / "out")
    config = made.config_file(tmp_path, base_num_decoder_layers=2)
    found = check(level, tmp_path / "out", ParityOptions(config=config))
    assert set(found) == {"description"}
    assert found["description"].status is Status.FAIL
    assert "base_num_decoder_layers=2" in found["description"].summary
    assert "num_hidden_layers is 4" in found["description"].summary


@pytest.fixture(scope="module")
def shorter(envy, tmp_path_factory):
    """The same model without its last two layers."""
    out = tmp_path_factory.mktemp("shorter") / "out"
    out.mkdir()
    kept = {
        name: value
        for name, value in load_file(envy / "fp32" / "model.safetensors").items()
        if not name.startswith(("model.layers.2.", "model.layers.3."))
    }
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    shutil.copy(envy / "fp32" / "config.json", out)
    edit(num_hidden_layers=2)(out)
    return out


def test_a_reference_of_fewer_layers_is_another_model(envy, shorter):
    found = check("layers", envy / "fp32", ParityOptions(against=shorter))
    assert set(found) == {"reference", "depth"}
    assert found["depth"].status is Status.FAIL
    assert "has 4 layers" in found["depth"].summary and "has 2" in found["depth"].summary


def test_a_reference_of_more_layers_is_another_model(envy, shorter, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    for path in shorter.iterdir():
        shutil.copy(path, out)
    found = check("layers", out, ParityOptions(against=envy / "fp32"))
    assert found["depth"].status is Status.FAIL
    assert "has 2 layers" in found["depth"].summary and "has 4" in found["depth"].summary


def test_logits_of_zeros_are_compared(envy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    apply("model.norm.weight", lambda v: v * 0)(out)
    found = check("layers", out, ParityOptions(against=out))
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}


# --- the parts -----------------------------------------------------------------------------------


def test_a_near_tie_is_told_from_a_mistake():
    rng = np.random.default_rng(0)
    right = rng.standard_normal((1, 50, 4))
    right[0, 20] = [3.0, 1.0, 1.0 - 1e-7, -1.0]
    noisy = right + 1e-6 * rng.standard_normal(right.shape)
    noisy[0, 20] = [3.0, 1.0, 1.0 + 1e-7, -1.0]
    found = compare_routing({0: right}, {0: noisy}, top_k=2, shape=(1, 50))
    assert (found.layers[0].status, found.layers[0].flips) == (Status.PASS, 1)
    assert found.settled[0, :20].all() and not found.settled[0, 20:].any()
    wrong = noisy.copy()
    wrong[0, 10] = wrong[0, 10, ::-1]
    found = compare_routing({0: right}, {0: wrong}, top_k=2, shape=(1, 50))
    assert found.layers[0].status is Status.FAIL and found.settled.all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moved_weights_stay_within_the_rounding(dtype):
    import ml_dtypes

    numpy_type = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    values[:10] = 0
    moved = Rounding(dtype, 8.0).move(values)
    rounded = values.astype(numpy_type).astype(np.float32)
    assert (moved[:10] == 0).all()
    apart, true = (np.sqrt(np.mean((v - values) ** 2)) for v in (moved, rounded))
    assert 0.9 < apart / true < 1.1
    assert np.array_equal(moved, Rounding(dtype, 8.0).move(values)), "copies are moved alike"


def test_exact_edges_are_not_moved(envy):
    assert roundings(Subject.open(envy / "fp32").edges.values()) == {}
    names = roundings(Subject.open(envy / "bf16").edges.values())
    assert set(names) == set(Subject.open(envy / "bf16").arrays.info)


def test_layers_are_laid_out_once_and_cleaned_up(envy, tmp_path):
    subject = Subject.open(envy / "fp32")
    name = ("MoeBlock_0.wi_0", 3)
    stored, entry = subject.layout.places[name]
    info = subject.arrays.info[stored.name]
    whole = subject.arrays.reader(info.name, 1 << 20).read(tuple(slice(0, n) for n in info.shape))
    with LayerReader(subject.arrays, subject.layout, scratch=tmp_path) as read:
        assert read.scratch_bytes > 0
        assert np.array_equal(read(*name), np.take(whole, entry, stored.axes.index("L")))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_rows_are_packed_text_and_random_ids(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    sample = Sample(("a b", "c"), "here")
    rows = make_rows(tmp_path, sample, count=20, vocab_size=9, context=16)
    assert rows.tokens.shape == (4, 16)
    assert rows.kinds == (TEXT, TEXT, RANDOM, RANDOM)
    assert rows.tokens[0, :8].tolist() == [0, 2, 3, 1, 0, 4, 1, 0]
    assert rows.targets[0, :3].tolist() == [2, 3, 1] and rows.targets[0, -1] == -1
    assert rows.tokens[2:].max() > 4 and rows.tokens.max() < 9
    bare = make_rows(tmp_path / "none", sample, count=20, vocab_size=9, context=16)
    assert set(bare.kinds) == {RANDOM} and "no tokenizer" in bare.text
    with pytest.raises(UsageError, match="makes id"):
        make_rows(tmp_path, sample, count=8, vocab_size=3, context=16)


def test_limits():
    assert len({limit.name for limit in LIMITS}) == len(LIMITS)
    assert KL.grade(9e-7) is Status.PASS
    assert KL.grade(2e-6) is Status.WARN
    assert KL.grade(2e-3) is Status.FAIL
    assert KL.grade(2e-6, rounding=1e-6) is Status.PASS
    assert HIDDEN.grade(float("nan")) is Status.FAIL


def test_what_cannot_run_says_why(envy, monkeypatch):
    with pytest.raises(UsageError, match="neither"):
        parse_against("pytorch")
    assert parse_against("maxtext") is None and str(parse_against("hf:x")) == "x"
    monkeypatch.setattr(Subject, "items", None)
    with pytest.raises(UnsupportedError, match="local disk"):
        check("logits", envy / "fp32")
