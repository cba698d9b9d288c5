"""Levels structure and weights: what is right passes, and every way of being wrong is found."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cli_runner
import numpy as np
import orbax_writer
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import samples
from safetensors.numpy import save_file

from moeconv.arch.parameters import PARAMETERS
from moeconv.arch.sidecar import SIDECAR_NAME
from moeconv.cli.verify import command
from moeconv.convert.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import MoeconvError, OutputError
from moeconv.hf.safetensors import read_header
from moeconv.mapping.edges import cannot_hold
from moeconv.mapping.families import FAMILIES
from moeconv.verify.outcome import Status, worst
from moeconv.verify.run import VerifyOptions, verify
from moeconv.verify.structure import check_structure, sha256
from moeconv.verify.subject import Subject
from moeconv.verify.tokenizers import check_own_tokenizer
from moeconv.verify.weights import check_weights

SIZES = {"V": 32, "D": 16, "H": 4, "K": 2, "h": 8, "E": 4, "F": 24}
GIB = 2**30


def weights(out: Path):
    return check_weights(Subject.open(out), jobs=2, memory=GIB)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(samples(), st.data())
def test_every_conversion_passes_and_every_flipped_bit_is_named(sample, data):
    family = data.draw(
        st.sampled_from([f for f in FAMILIES.values() if not cannot_hold(f, sample.model)])
    )
    chunks = {
        p: tuple(data.draw(st.integers(1, n)) for n in a.shape) for p, a in sample.arrays.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        step = orbax_writer.write(root / "1", sample.arrays, chunks)
        (root / "config.yml").write_text(yaml.safe_dump(sample.told))
        options = ConvertOptions(
            config=root / "config.yml",
            sets=(f"param_scan_axis={sample.told['param_scan_axis']}",),
            target=family.name,
            dtype=data.draw(st.sampled_from(["keep", "float32", "bfloat16"])),
            untie=data.draw(st.booleans()),
        )
        convert(plan_conversion(str(step), options), root / "out")
        assert worst(weights(root / "out")) is Status.PASS
        header = read_header(root / "out" / "model.safetensors")
        name = data.draw(st.sampled_from(sorted(header)))
        spec, offset = header[name]
        bit = data.draw(st.integers(0, spec.nbytes * 8 - 1))
        with (root / "out" / "model.safetensors").open("r+b") as file:
            file.seek(offset + bit // 8)
            byte = file.read(1)[0]
            file.seek(offset + bit // 8)
            file.write(bytes([byte ^ (1 << bit % 8)]))
        values = weights(root / "out")[-1]
        assert values.status is Status.FAIL
        assert values.tensors == [name]
        assert sum(values.metrics["differing"].values()) == 1


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A right conversion of an interleaved model, with square matrices."""
    root = tmp_path_factory.mktemp("right")
    rng = np.random.default_rng(1)
    sizes = SIZES | {"F": 16, "H": 2, "K": 2}
    arrays = {}
    for parameter in PARAMETERS.values():
        name = tuple(parameter.name.split("."))
        shape = [sizes[a] for a in parameter.axes]
        if parameter.layers is None:
            if parameter.name != "decoder.logits_dense.kernel":
                arrays[name] = rng.standard_normal(shape).astype(np.float32)
            continue
        for slot, kind in enumerate(("dense", "moe")):
            if kind in parameter.layers:
                stacked = [shape[0], 3, *shape[1:]]
                path = ("decoder", "layers", f"layers_{slot}", *name)
                arrays[path] = rng.standard_normal(stacked).astype(np.float32)
                arrays[path][0] = 0.0
    step = orbax_writer.write(root / "run" / "checkpoints" / "9", arrays)
    (root / "config.yml").write_text("decoder_block: envy\nnum_experts_per_tok: 2\n")
    options = ConvertOptions(config=root / "config.yml")
    convert(plan_conversion(str(step), options), root / "out")
    return root / "out"


def edit(out: Path, **changes) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))


def tensor(out: Path, name: str) -> np.ndarray:
    spec, offset = read_header(out / "model.safetensors")[name]
    return np.memmap(out / "model.safetensors", np.float32, "r+", offset=offset, shape=spec.shape)


def swap(out: Path, one: str, other: str) -> None:
    a, b = tensor(out, one), tensor(out, other)
    a[:], b[:] = b.copy(), a.copy()


def scale(out: Path, name: str, factor: float) -> None:
    tensor(out, name)[:] *= np.float32(factor)


def change(out: Path, name: str, by) -> None:
    values = tensor(out, name)
    values[:] = by(values.copy())


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def minus_zero(values: np.ndarray) -> np.ndarray:
    """The first 0.0 becomes -0.0, which compares equal."""
    values[tuple(np.argwhere(values == 0)[0])] = -0.0
    return values


LAYER = "model.layers.{}."
MOE = LAYER.format(3) + "block_sparse_moe."
ATTENTION = LAYER.format(2) + "self_attn."

# What is broken; how; the check that must fail; the layer it must name.
MUTATIONS = {
    "query scale doubled": (lambda o: scale(o, ATTENTION + "q_proj.weight", 2), "values", 2),
    "query scale missing": (
        lambda o: scale(o, ATTENTION + "q_proj.weight", 8**-0.5), "values", 2),
    "logit scale missing": (lambda o: scale(o, "model.norm.weight", 4), "values", None),
    "w1 and w3 swapped": (
        lambda o: swap(o, MOE + "experts.1.w1.weight", MOE + "experts.1.w3.weight"), "values", 3),
    "two experts swapped": (
        lambda o: swap(o, MOE + "experts.0.w2.weight", MOE + "experts.2.w2.weight"), "values", 3),
    "router columns permuted": (
        lambda o: change(o, MOE + "gate.weight", lambda v: v[::-1]), "values", 3),
    "one layer off": (
        lambda o: swap(o, LAYER.format(0) + "input_layernorm.weight",
                       LAYER.format(2) + "input_layernorm.weight"), "values", 0),
    "interleave shifted": (
        lambda o: swap(o, LAYER.format(0) + "self_attn.o_proj.weight",
                       LAYER.format(1) + "self_attn.o_proj.weight"), "values", 0),
    "transpose of a square matrix missing": (
        lambda o: change(o, ATTENTION + "o_proj.weight", np.transpose), "values", 2),
    "query rows permuted within heads": (
        lambda o: change(o, ATTENTION + "q_proj.weight",
                         lambda v: v.reshape(2, 2, 4, 16).swapaxes(1, 2).reshape(v.shape)),
        "values", 2),
    "key and value swapped": (
        lambda o: swap(o, ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"), "values", 2),
    "heads misordered": (
        lambda o: change(o, ATTENTION + "k_proj.weight",
                         lambda v: v.reshape(2, 8, 16)[::-1].reshape(v.shape)), "values", 2),
    "final norm of another layer": (
        lambda o: change(o, "model.norm.weight",
                         lambda v: tensor(o, LAYER.format(5) + "input_layernorm.weight")),
        "values", None),
    "one expert zeroed": (
        lambda o: scale(o, MOE + "experts.2.w1.weight", 0), "values", 3),
    "copies of a dense MLP differ": (
        lambda o: scale(o, LAYER.format(4) + "block_sparse_moe.experts.3.w1.weight", 2),
        "values", 4),
    "router of a dense layer not zero": (
        lambda o: change(o, LAYER.format(4) + "block_sparse_moe.gate.weight", lambda v: v + 1),
        "values", 4),
    "bf16-rounded weights claimed as fp32": (
        lambda o: change(o, "model.embed_tokens.weight", bfloat16), "values", None),
    "wrong theta": (lambda o: edit(o, rope_theta=1e6), "config", None),
    "theta in one place only": (lambda o: edit(o, rope_parameters=None), "readers", None),
    "theta of transformers 4 only": (lambda o: edit(o, rope_theta=1e6), "readers", None),
    "RoPE scaled for transformers 4 only": (
        lambda o: edit(o, rope_scaling={"rope_type": "linear", "factor": 2.0}), "readers", None),
    "dtype of transformers 4 only": (lambda o: edit(o, torch_dtype="float16"), "readers", None),
    "wrong epsilon": (lambda o: edit(o, rms_norm_eps=1e-6), "config", None),
    "wrong top-k": (lambda o: edit(o, num_experts_per_tok=1), "config", None),
    "tie flag wrong": (lambda o: edit(o, tie_word_embeddings=False), "tying", None),
    "an expert more": (lambda o: edit(o, num_local_experts=5), "transformers", None),
    "wider MLP": (lambda o: edit(o, intermediate_size=32), "transformers", None),
    "a NaN": (lambda o: change(o, MOE + "gate.weight", lambda v: v * np.nan), "finite", None),
    "a file cut": (
        lambda o: (o / "model.safetensors").write_bytes(
            (o / "model.safetensors").read_bytes()[:-4]), "tensors", None),
    "a file gone": (lambda o: (o / "generation_config.json").unlink(), "files", None),
    "the sign of a zero": (
        lambda o: change(o, ATTENTION + "q_proj.weight", minus_zero), "values", 2),
    "another dtype claimed": (lambda o: edit(o, dtype="bfloat16"), "dtypes", None),
    "a dtype that is none": (lambda o: edit(o, dtype=["float32"]), "dtypes", None),
}  # fmt: skip


def test_the_right_one_passes(right):
    checks = check_structure(Subject.open(right)) + weights(right)
    assert worst(checks) is Status.PASS
    assert {c.name for c in checks if c.status is Status.SKIP} == {"tokenizer"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mistake_is_found(right, tmp_path, name):
    break_it, check, layer = MUTATIONS[name]
    out = tmp_path / "out"
    shutil.copytree(right, out)
    break_it(out)
    subject = Subject.open(out)
    found = {c.name: c for c in check_structure(subject)}
    assert found["files"].status is Status.FAIL, "the manifest's sha256 sees any change"
    if check == "values":
        found |= {c.name: c for c in weights(out)}
        assert found["source"].status is Status.PASS
    assert found[check].status is Status.FAIL
    assert found[check].layer == layer


@pytest.fixture(scope="module")
def told(right, tmp_path_factory):
    """The same run with a sidecar and a tokenizer, converted."""
    root = tmp_path_factory.mktemp("told")
    shutil.copytree(right.parent / "run", root / "run")
    write_tokenizer(root / "run" / "tokenizer", [f"w{n}" for n in range(30)])
    config = {"decoder_block": "envy", "num_experts_per_tok": 2}
    sidecar = {"format": "moeconv-run", "version": 1, "config": config, "tokenizer": "tokenizer"}
    (root / "run" / SIDECAR_NAME).write_text(json.dumps(sidecar))
    convert(plan_conversion(str(root / "run"), ConvertOptions()), root / "out")
    return root / "out"


def write_tokenizer(folder: Path, words: list[str], *, split="WhitespaceSplit") -> None:
    tokens = ["<s>", "</s>", *words]
    folder.mkdir(exist_ok=True)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": n, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for n, t in enumerate(tokens[:2])],
        "normalizer": None,
        "pre_tokenizer": {"type": split},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {t: n for n, t in enumerate(tokens)},
                  "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# The tokenizer that lies in OUT; the verdict on it at level weights; words of it.
TOKENIZERS = {
    "the run's own": ([f"w{n}" for n in range(30)], {}, Status.PASS, "the run's own"),
    "stale": (
        [f"w{n}" for n in (1, 0, *range(2, 30))], {}, Status.FAIL,
        "2 tokens have other ids, 'w0' has 3 instead of 2"),
    "of another release": (
        [f"w{n}" for n in range(30)], {"split": "Whitespace"}, Status.WARN,
        "but another pre_tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stale_tokenizer_is_found(told, tmp_path, name):
    words, options, status, summary = TOKENIZERS[name]
    out = tmp_path / "out"
    shutil.copytree(told, out)
    write_tokenizer(out, words, **options)
    (check,) = check_own_tokenizer(Subject.open(out))
    assert (check.status, check.level) == (status, "weights")
    assert summary in check.summary


def test_a_tokenizer_that_does_not_fit_is_found_without_the_checkpoint(told, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(told, out)
    write_tokenizer(out, [f"w{n}" for n in range(40)])
    found = tokenizer_check(out)
    assert found.status is Status.FAIL and "32" in found.summary and "42" in found.summary
    write_tokenizer(out, [f"w{n}" for n in range(30)])
    edit(out, eos_token_id=0)
    found = tokenizer_check(out)
    assert found.status is Status.FAIL
    assert found.summary == "eos_token_id: 1 in the tokenizer, 0 in config"


def tokenizer_check(out: Path):
    return next(c for c in check_structure(Subject.open(out)) if c.name == "tokenizer")


def test_text_must_survive_the_tokenizer(told, tmp_path):
    found = tokenizer_check(told)  # which has 30 words
    assert found.status is Status.FAIL and "text does not survive the tokenizer" in found.summary
    out = tmp_path / "out"
    shutil.copytree(told, out)
    content = json.loads((out / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Unheard"}
    (out / "tokenizer.json").write_text(json.dumps(content))
    found = tokenizer_check(out)
    assert found.status is Status.FAIL and "cannot" in found.summary


def admit(out: Path, *names: str, **fields) -> None:
    """The manifest is made to agree with files that somebody changed."""
    manifest = json.loads((out / "moeconv.json").read_text())
    for name in names:
        record = {"size": (out / name).stat().st_size, "sha256": sha256(out / name)}
        manifest["files"][name] = record
    (out / "moeconv.json").write_text(json.dumps(manifest | fields))


def test_a_tensor_too_many_is_found_without_transformers(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    save_file({"model.more.weight": np.ones(4, np.float32)}, out / "model-more.safetensors")
    admit(out, "model-more.safetensors")
    (found,) = weights(out)
    assert found.status is Status.FAIL and found.tensors == ["model.more.weight"]


def test_rounded_weights_that_everything_calls_fp32_are_found(right, tmp_path):
    options = ConvertOptions(config=right.parent / "config.yml", dtype="bfloat16")
    out = tmp_path / "out"
    convert(plan_conversion(str(right.parent / "run"), options), out)
    assert worst(check_structure(Subject.open(out))) is Status.PASS
    edit(out, dtype="float32", torch_dtype="float32")
    admit(out, "config.json", dtype="float32")
    found = {c.name: c for c in check_structure(Subject.open(out))}
    assert {n for n, c in found.items() if c.status is Status.FAIL} == {"dtypes"}
    assert "config.json says float32" in found["dtypes"].summary
    assert weights(out)[0].status is Status.FAIL


def cut(out: Path) -> None:
    file = out / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


# What is damaged, so that level weights cannot run; a check of level structure that fails.
CUT = {
    "weights cut": (cut, "tensors"),
    "tokenizer no JSON": (lambda o: (o / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer no object": (lambda o: (o / "tokenizer.json").write_text("[]"), "tokenizer"),
    "tokenizer of nothing": (lambda o: (o / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("name", CUT)
def test_what_failed_stays_failed_when_a_later_level_cannot_run(told, tmp_path, name):
    damage, check = CUT[name]
    out = tmp_path / "out"
    shutil.copytree(told, out)
    damage(out)
    options = VerifyOptions(levels=("structure", "weights"))
    report = verify(out, source=None, options=options)
    assert report.verdict is Status.FAIL
    assert report.levels["structure"] is Status.FAIL
    found = {(c.level, c.name): c for c in report.checks}
    assert found["structure", check].status is Status.FAIL
    assert found["weights", "weights"].status is Status.SKIP
    assert str(out) in found["weights", "weights"].summary
    with pytest.raises(MoeconvError):
        verify(out, source=None, options=VerifyOptions(levels=("weights",)))


def test_a_verdict_is_of_the_bytes_that_were_seen(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)

    def somebody(text: str) -> None:
        if text == "level weights":
            edit(out, rms_norm_eps=1e-6)
            admit(out, "config.json")

    options = VerifyOptions(levels=("structure", "weights"))
    with pytest.raises(OutputError, match=r"changed while it was verified \(.*config.json"):
        verify(out, source=None, options=options, note=somebody)


def test_a_report_that_cannot_be_written_is_known_before_the_work(right, tmp_path):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "report")
    result = CliRunner().invoke(command, [str(right), "--report", place])
    assert result.exit_code == 2
    assert "give another folder with --report" in result.output and "level" not in result.output


def test_a_checkpoint_that_is_gone_is_asked_for(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    manifest = json.loads((out / "moeconv.json").read_text())
    manifest["source"]["path"] = str(tmp_path / "gone")
    (out / "moeconv.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert result.exit_code == 2
    assert "--source gives another, and level structure needs none" in result.output
    quiet = CliRunner().invoke(command, [str(out), "--level", "structure", "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_the_command_writes_a_bound_verdict(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    result = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "verify.json").read_text())
    assert report["verdict"] == "pass", result.output
    assert report["levels"] == {"weights": "pass"}
    manifest = json.loads((out / "moeconv.json").read_text())
    assert report["source"] == manifest["source"]["digest"]
    for name, record in manifest["files"].items():
        assert report["files"][name] == record["sha256"]
    assert "moeconv.json" in report["files"]


def test_a_level_alone_proves_little_and_keeps_what_is_known(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    alone = CliRunner().invoke(command, [str(out), "--level", "structure"])
    assert "PASS: nothing is wrong at level structure; that it is the model" in alone.output
    both = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert "kept in the report, of the same bytes: structure pass" in both.output
    report = json.loads((out / "verify.json").read_text())
    assert report["levels"] == {"structure": "pass", "weights": "pass"}
    edit(out, rms_norm_eps=1e-6)
    other = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert "kept" not in other.output, "those are other bytes"
    assert json.loads((out / "verify.json").read_text())["levels"] == {"weights": "pass"}


def damage_manifest(out: Path) -> None:
    content = json.loads((out / "moeconv.json").read_text())
    (out / "moeconv.json").write_text(json.dumps(content | {"model": {}}))


def field(name: str, value):
    """The manifest tells another value of the model."""

    def change(out: Path) -> None:
        content = json.loads((out / "moeconv.json").read_text())
        content["model"][name]["value"] = value
        (out / "moeconv.json").write_text(json.dumps(content))

    return change


def header(text: str):
    """The safetensors file begins with another header."""

    def change(out: Path) -> None:
        raw = text.encode()
        (out / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)

    return change


def config(name: str, value):
    return lambda out: edit(out, **{name: value})


DEEP = "[" * 100_000
SPARSE = '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}'

# What is damaged; the exit code; words of the answer.
DAMAGED = {
    "scaling a text": (config("rope_scaling", "linear"), 1, "rope_scaling of config.json is"),
    "scaling a number": (config("rope_scaling", -1), 1, "rope_scaling of config.json is -1"),
    "parameters a text": (config("rope_parameters", "x"), 1, "rope_parameters of config.json is"),
    "header a list": (header("[]"), 1, "is not a whole safetensors file: its header is no JSON"),
    "header null": (header("null"), 1, "is not a whole safetensors file: its header is no JSON"),
    "header deep": (header(DEEP), 1, "is not a whole safetensors file"),
    "header of fractions": (header(SPARSE), 1, "sizes that are no whole numbers"),
    "no vocabulary": (field("vocab_size", None), 2, "is not a manifest"),
    "vocabulary a text": (field("vocab_size", "x"), 2, "is not a manifest"),
    "vocabulary empty": (field("vocab_size", 0), 2, "is not a manifest"),
    "width a text": (field("intermediate_size", "x"), 2, "is not a manifest"),
    "no experts": (field("num_experts", None), 2, "is not a manifest"),
    "no layers": (field("layer_kinds", []), 2, "is not a manifest"),
    "foreign block": (field("decoder_block", "gemma"), 2, "is not a manifest"),
    "manifest deep": (lambda o: (o / "moeconv.json").write_text(DEEP), 2, "is not a manifest"),
    "config no object": (lambda o: (o / "config.json").write_text("[]"), 1, "is no JSON object"),
    "config no UTF-8": (lambda o: (o / "config.json").write_bytes(b"\xff{}"), 1, "cannot be read"),
    "config gone": (lambda o: (o / "config.json").unlink(), 1, "cannot be read"),
    "manifest of no model": (damage_manifest, 2, "is not a manifest"),
    "nothing there": (shutil.rmtree, 2, "does not exist"),
    "index of no names": (
        lambda o: (o / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        1,
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_said_in_a_sentence(right, tmp_path, name):
    damage, code, words = DAMAGED[name]
    out = tmp_path / "out"
    shutil.copytree(right, out)
    damage(out)
    result = CliRunner().invoke(command, [str(out), "--level", "structure"])
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert isinstance(result.exception, SystemExit)


def test_a_file_that_cannot_be_read_leaves_no_verdict(right, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    opened = Path.open

    def refuses(path: Path, *args, **kwargs):
        if path.name == "generation_config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuses)
    result = CliRunner().invoke(command, [str(out), "--level", "structure", "--quiet"])
    assert result.exit_code == 2
    assert result.output.startswith("error: no verdict: ")
    assert "generation_config.json cannot be read: Permission denied" in result.output
    assert result.output.count("\n") == 1


def test_a_bug_is_no_verdict(right, monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise AttributeError("of ours")

    monkeypatch.setattr("moeconv.verify.run.check_structure", fails)
    options = [str(right), "--level", "structure", "--report", str(tmp_path / "report")]
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 2
    assert "Traceback" in result.output and "AttributeError: of ours" in result.output
    assert "error: no verdict" in result.output
    assert not (tmp_path / "report").exists()


def test_a_verdict_that_nobody_reads_is_one(right, tmp_path):
    """`moeconv verify OUT | head -1`, of one that passes."""
    for args in ((), ("--json",)):
        process = cli_runner.spawn(
            "verify", right, "--level", "weights", "--report", tmp_path, *args
        )
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(60) == 0
        assert (tmp_path / "verify.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_alike(right, tmp_path, number):
    """Interrupted while it works, it ends with 130 and leaves nothing."""
    code = (
        "import os, sys, tempfile, time\n"
        "from moeconv.verify import run\n"
        "def waits(subject):\n"
        "    with tempfile.TemporaryDirectory(prefix='moeconv-verify-'):\n"
        "        os.write(1, b'working\\n')\n"
        "        time.sleep(60)\n"
        "run.check_structure = waits\n"
        "from moeconv.cli.main import main\n"
        f"sys.argv = ['moeconv', 'verify', {str(right)!r}, '--level', 'structure', '-q',\n"
        f"            '--report', {str(tmp_path / 'report')!r}]\n"
        "main()\n"
    )
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli_runner.environment(TMPDIR=str(tmp_path / "tmp")),
    )
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err.strip()) == ("", "interrupted")
    assert process.returncode == 130
    assert list((tmp_path / "tmp").iterdir()) == []


def test_memory_that_cannot_suffice_is_refused(right, tmp_path):
    options = [str(right), "--level", "weights", "--report", str(tmp_path), "--max-memory"]
    result = CliRunner().invoke(command, [*options, "1KB"])
    assert result.exit_code == 2
    said = re.search(r"--max-memory 1 kB is below the .* give --max-memory (\d+MiB)", result.output)
    assert said, result.output
    assert CliRunner().invoke(command, [*options, said[1]]).exit_code == 0


def test_the_command_fails_with_one(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    scale(out, "model.norm.weight", 2)
    result = CliRunner().invoke(command, [str(out), "--level", "weights", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["verdict"] == "fail"
    assert report["checks"][-1]["tensors"] == ["model.norm.weight"]


def test_another_checkpoint_is_told_apart(right, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(right.parent / "run", run)
    out = tmp_path / "out"
    shutil.copytree(right, out)
    other = {p: a + 1 for p, a in _arrays(run).items()}
    shutil.rmtree(run)
    step = orbax_writer.write(run / "checkpoints" / "9", other)
    result = CliRunner().invoke(command, [str(out), "--source", str(step), "--level", "weights"])
    assert result.exit_code == 1
    assert "are not those that were converted" in result.output


def _arrays(run: Path):
    from moeconv.convert.source import open_checkpoint

    opened = open_checkpoint(str(run), sets=("decoder_block=envy",))
    found = {}
    for info in opened.arrays.info.values():
        reader = opened.arrays.reader(info.name, 1 << 20)
        found[info.path] = reader.read(tuple(slice(0, n) for n in info.shape)).copy()
    return found
