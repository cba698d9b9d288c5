"""Every mistake ends in one sentence, a documented exit code, and nothing on the disk."""

import inspect as python_inspect
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import cli_runner
import numpy as np
import pytest
import synthetic
import tensorstore as ts
import yaml
from cli_runner import Ran, moeconv
from maxtext_lab import ENVY, TIED
from safetensors import safe_open

from moeconv import errors
from moeconv.errors import (
    ConfigError,
    MoeconvError,
    NotACheckpointError,
    OutputError,
    TensorError,
    TokenizerError,
    UnsupportedError,
    UsageError,
)

DOCS = Path(__file__).parents[2] / "docs"
CLICK_USAGE = 2


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that writes a checkpoint once, and gives a copy to be damaged."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(folder: Path, block: str = "mixtral", **how):
        key = repr((block, sorted(how.items())))
        if key not in known:
            known[key] = synthetic.write(root / str(len(known)), block, **how)
        first = known[key]
        run = folder / "run"
        shutil.copytree(first.run, run)
        step = run / first.step_dir.relative_to(first.run)
        return synthetic.Synthetic(run, step, first.config, first.arrays, first.axes)

    return make


@pytest.fixture
def checkpoint(made, tmp_path):
    """mixtral, scanned, tied, OCDBT + zarr3; one chunk an array."""
    return made(tmp_path)


@pytest.fixture
def plain(made, tmp_path):
    """The same as zarr2 without OCDBT: a folder an array."""
    return made(tmp_path, ocdbt=False, zarr3=False)


def convert(checkpoint, *flags: object, told: dict | None = None) -> Ran:
    """Converts to `<run>/../out` with the run's YAML."""
    work = checkpoint.run.parent
    config = checkpoint.config_file(work, **(told or {}))
    return moeconv("convert", checkpoint.run, work / "out", "--config", config, *flags)


def refused(ran: Ran, error: type[MoeconvError] | int, *words: str, out: Path | None = None) -> str:
    """Checks a failure: its code, its sentence, and that nothing was written."""
    code = error if isinstance(error, int) else error.exit_code
    sentence = ran.error
    assert ran.code == code, sentence
    for word in words:
        assert word in sentence, sentence
    assert not sentence[0].isupper() or sentence.startswith("OUT ")
    assert ran.out == ""
    if out is not None:
        left = [name for name in os.listdir(out.parent) if out.name in name]
        assert left == []
    return sentence


def out_of(checkpoint) -> Path:
    return checkpoint.run.parent / "out"


# --- the checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("empty", ["is no MaxText checkpoint", "_METADATA"]),
        ("file", ["is a file", "give a MaxText run"]),
        ("missing", ["does not exist"]),
        ("random", ["is no MaxText checkpoint"]),
        ("empty-checkpoints", ["is no MaxText checkpoint"]),
        ("empty-step", ["holds only unfinished saves (7"]),
        ("converted", ["is no MaxText checkpoint"]),
    ],
)
def test_not_a_checkpoint(tmp_path, what, words, command):
    source = tmp_path / what
    if what == "file":
        source.write_text("a file")
    elif what != "missing":
        source.mkdir()
    if what == "random":
        (source / "README.md").write_text("# hello")
        (source / "src").mkdir()
    if what == "empty-checkpoints":
        (source / "checkpoints").mkdir()
    if what == "empty-step":
        (source / "checkpoints" / "7").mkdir(parents=True)
    if what == "converted":
        (source / "config.json").write_text("{}")
        (source / "moeconv.json").write_text('{"format": "moeconv"}')
    out = tmp_path / "out"
    args = [out] if command == "convert" else []
    refused(moeconv(command, source, *args), NotACheckpointError, str(source), *words, out=out)


def test_a_home_that_nobody_has():
    refused(moeconv("inspect", "~no-such-user/run"), NotACheckpointError, "~no-such-user")


@pytest.mark.parametrize(
    ("args", "what"),
    [(["convert", "CKPT", "", "--overwrite"], "the argument after CKPT"),
     (["convert", "", "out"], "the argument after convert"),
     (["convert", "CKPT", "out", "--config", ""], "the argument after --config"),
     (["convert", "CKPT", "out", "--config="], "the value of --config="),
     (["verify", "out", "--source="], "the value of --source="),
     (["data", "prepare", "", "--out", "x"], "the argument after prepare"),
     (["push", ""], "the argument after push"), ([""], "the argument after moeconv")],
)  # fmt: skip
def test_an_empty_argument(tmp_path, monkeypatch, args, what):
    monkeypatch.chdir(tmp_path)
    sentence = refused(moeconv(*args), UsageError, what)
    assert sentence == f"{what} is empty; is a shell variable not set?"
    assert os.listdir(tmp_path) == []


def test_no_arguments():
    for args in (["convert"], ["convert", "run"], ["inspect"], ["frobnicate"], ["convert", "--x"]):
        ran = moeconv(*args)
        assert ran.code == CLICK_USAGE
        assert "Usage: " in ran.err
        assert "Traceback" not in ran.err


def test_an_unfinished_save(checkpoint):
    (checkpoint.step_dir / "commit_success.txt").unlink()
    for spec in (checkpoint.step_dir, checkpoint.items):
        ran = moeconv("convert", spec, out_of(checkpoint))
        refused(ran, NotACheckpointError, "has no commit_success.txt", out=out_of(checkpoint))
    ran = convert(checkpoint)
    refused(ran, NotACheckpointError, "only unfinished saves (0", out=out_of(checkpoint))


def test_a_save_in_progress(checkpoint):
    """What Orbax calls a step while it is being written."""
    tmp = checkpoint.step_dir.with_name("5.orbax-checkpoint-tmp")
    checkpoint.step_dir.rename(tmp)
    ran = convert(checkpoint)
    refused(ran, NotACheckpointError, "only unfinished saves (5.orbax-checkpoint-tmp)",
            out=out_of(checkpoint))  # fmt: skip
    ran = moeconv("convert", tmp, out_of(checkpoint))
    refused(ran, NotACheckpointError, "is a save in progress", out=out_of(checkpoint))


def test_newer_unfinished_steps_are_passed_over(checkpoint):
    steps = checkpoint.step_dir.parent
    for name in ("3", "12"):
        shutil.copytree(checkpoint.step_dir, steps / name)
    (steps / "12" / "commit_success.txt").unlink()
    (steps / "20").mkdir()
    (steps / "30.orbax-checkpoint-tmp-1").mkdir()
    ran = convert(checkpoint)
    assert ran.code == 0
    assert "warning: newer steps are unfinished and were passed over: 20, 12" in ran.err
    manifest = json.loads((out_of(checkpoint) / "moeconv.json").read_text())
    assert manifest["source"]["step"] == 3


@pytest.mark.parametrize(
    "content",
    ["", "{", "not json", "[1, 2]", "null", '"text"', "{}", '{"tree_metadata": null}',
     '{"tree_metadata": {"a": {}}}', '{"tree_metadata": {"a": {"key_metadata": 3}}}',
     '{"tree_metadata": {}}', '{"tree_metadata": {"a": null}}', "[" * 100_000,
     '{"tree_metadata": {"()": {"key_metadata": [], "value_metadata": {"value_type": "x"}}}}',
     '{"tree_metadata": {"a": {"key_metadata": [{"key": "params"}, {"key": "params"}],'
     ' "value_metadata": {"value_type": "x"}}}}', b"\xff\xfe\x00"],
)  # fmt: skip
def test_metadata_of_something_else(checkpoint, content):
    path = checkpoint.items / "_METADATA"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(convert(checkpoint), NotACheckpointError, str(checkpoint.items),
            out=out_of(checkpoint))  # fmt: skip


def test_metadata_that_is_cut(checkpoint):
    path = checkpoint.items / "_METADATA"
    os.truncate(path, path.stat().st_size // 2)
    refused(convert(checkpoint), NotACheckpointError, "_METADATA is not the tree metadata",
            out=out_of(checkpoint))  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, b"\xff"])
def test_step_metadata_that_is_damaged(checkpoint, content):
    path = checkpoint.step_dir / "_CHECKPOINT_METADATA"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(convert(checkpoint), NotACheckpointError, "_CHECKPOINT_METADATA is not JSON",
            out=out_of(checkpoint))  # fmt: skip


@pytest.mark.parametrize("custom", [[1], "text", 3, None, {"scan_layers": "yes"}, {}])
def test_custom_metadata_of_another_kind(checkpoint, custom):
    path = checkpoint.step_dir / "_CHECKPOINT_METADATA"
    content = {**json.loads(path.read_text()), "custom_metadata": custom}
    path.write_text(json.dumps(content))
    assert convert(checkpoint).code == 0


def test_scan_layers_that_contradicts_the_parameters(checkpoint):
    path = checkpoint.step_dir / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"scan_layers": true', '"scan_layers": false'))
    refused(convert(checkpoint), TensorError, "scan_layers=false", out=out_of(checkpoint))


# --- damaged data -------------------------------------------------------------------------------

WI_0 = "decoder.layers.MoeBlock_0.wi_0"


def data_file(items: Path) -> Path:
    """The file that holds nearly everything of an OCDBT store."""
    return max(items.rglob("d/*"), key=lambda p: p.stat().st_size)


def cut(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def scribble(path: Path) -> None:
    """Ruins the head of a chunk, which every reader of it must notice."""
    raw = bytearray(path.read_bytes())
    raw[:8] = b"\x00" * 8
    path.write_bytes(raw)


@pytest.mark.parametrize("keep", [0.95, 0.5, 0.0])
def test_a_truncated_ocdbt_file(maxtext_lab, tmp_path, keep):
    """As MaxText wrote it."""
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    run = tmp_path / "run"
    shutil.copytree(lab.run_dir, run)
    cut(data_file(run), keep)
    config = tmp_path / "config.yml"
    config.write_text("decoder_block: envy\nnum_experts_per_tok: 2\n")
    out = tmp_path / "out"
    ran = moeconv("convert", run, out, "--config", config)
    items = run / "checkpoints" / "0" / "items"
    refused(ran, TensorError, str(items), "parameter ", "damaged", "use another step", out=out)


@pytest.mark.parametrize("damage", ["gone", "zeros"])
def test_an_ocdbt_file_without_its_content(made, tmp_path, damage):
    checkpoint = made(tmp_path, sizes={"L": 4, "V": 512, "D": 64, "M": 64})
    path = data_file(checkpoint.items)
    size = path.stat().st_size
    path.unlink()
    if damage == "zeros":
        path.write_bytes(bytes(size))
    sentence = refused(convert(checkpoint), TensorError, "damaged", out=out_of(checkpoint))
    assert f"{checkpoint.items}: parameter " in sentence


@pytest.mark.parametrize("damage", ["gone", "cut", "zeros"])
@pytest.mark.parametrize("pattern", ["manifest.ocdbt", "d/*"])
def test_a_damaged_ocdbt_index(maxtext_lab, tmp_path, damage, pattern):
    """As MaxText wrote it."""
    run = tmp_path / "run"
    shutil.copytree(maxtext_lab.checkpoint(ENVY, TIED).run_dir, run)
    [path] = (run / "checkpoints" / "0" / "items").glob(pattern)
    raw = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else bytes(len(raw)))
    ran = moeconv("convert", run, tmp_path / "out")
    words = ("cannot be opened", "the save is incomplete or damaged")
    refused(ran, NotACheckpointError, *words, out=tmp_path / "out")


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("split", [{}, {"M": 2}])
def test_a_missing_chunk_of_an_ocdbt_store(made, tmp_path, zarr3, split):
    """Never zeros."""
    checkpoint = made(tmp_path, zarr3=zarr3, split=split)
    base = {"driver": "file", "path": f"{checkpoint.items}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = [k for k in store.list().result() if WI_0.encode() in k and b".z" not in k]
    [*_, last] = sorted(k for k in keys if b"zarr.json" not in k)
    store.delete_range(ts.KvStore.KeyRange(last, last + b"\0")).result()
    refused(convert(checkpoint), TensorError, WI_0, "missing", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("damage", "word"),
    [(lambda p: cut(p, 0.5), "ZSTD"), (lambda p: cut(p, 0.0), "ZSTD"),
     (scribble, "ZSTD"), (Path.unlink, "missing")],
    ids=["cut", "empty", "scribbled", "gone"],
)  # fmt: skip
def test_a_damaged_zarr_chunk(plain, damage, word):
    damage(plain.items / f"params.params.{WI_0}" / "0.0.0.0")
    sentence = refused(convert(plain), TensorError, WI_0, "damaged", out=out_of(plain))
    assert word.lower() in sentence.lower()


@pytest.mark.parametrize("jobs", [1, 4])
def test_damage_found_late_leaves_nothing(made, tmp_path, jobs):
    """The last of many arrays: most of the output is written by then."""
    checkpoint = made(tmp_path, scanned=False, ocdbt=False, zarr3=False)
    last = "decoder.layers_3.pre_self_attention_layer_norm.scale"
    scribble(checkpoint.items / f"params.params.{last}" / "0")
    ran = convert(checkpoint, "--jobs", jobs)
    refused(ran, TensorError, last, "damaged", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda p: cut(p, 0.3), NotACheckpointError, ["cannot be opened"]),
        (Path.unlink, NotACheckpointError, ["cannot be opened"]),
        (lambda p: p.write_text(p.read_text().replace("zstd", "frob")), NotACheckpointError,
         ["cannot be opened", "frob"]),
        (lambda p: p.write_text(p.read_text().replace("<f4", "<i4")), UnsupportedError,
         ["stored as int32", "float32, bfloat16, float16"]),
        (lambda p: p.write_text(p.read_text().replace("<f4", "<f8")), UnsupportedError,
         ["stored as float64"]),
        (lambda p: p.write_text(p.read_text().replace("24]", "23]")), TensorError, ["wi_"]),
    ],
    ids=["cut", "gone", "codec", "int32", "float64", "shape"],
)  # fmt: skip
def test_damaged_zarr_metadata(plain, change, error, words):
    change(plain.items / f"params.params.{WI_0}" / ".zarray")
    refused(convert(plain), error, *words, out=out_of(plain))


# --- parameters ---------------------------------------------------------------------------------


def changed(tmp_path, change, block="mixtral", **how):
    return synthetic.write(tmp_path / "run", block, change=change, **how)


@pytest.mark.parametrize(
    "name",
    ["token_embedder.embedding", "decoder.decoder_norm.scale", WI_0,
     "decoder.layers.MoeBlock_0.gate.kernel", "decoder.layers.self_attention.key.kernel",
     "decoder.layers.pre_self_attention_layer_norm.scale"],
)  # fmt: skip
def test_a_missing_parameter(tmp_path, name):
    checkpoint = changed(tmp_path, lambda arrays: arrays.pop(name))
    short = name.removeprefix("decoder.layers.")
    refused(convert(checkpoint), TensorError, short, out=out_of(checkpoint))


def test_a_missing_parameter_of_one_layer(tmp_path):
    name = "decoder.layers_2.mlp.wi_0.kernel"
    checkpoint = changed(tmp_path, lambda a: a.pop(name), "llama2", scanned=False)
    words = ("decoder.layers_2", "missing mlp.wi_0.kernel")
    refused(convert(checkpoint), TensorError, *words, out=out_of(checkpoint))


def test_a_missing_layer(tmp_path):
    def drop(arrays):
        for name in [n for n in arrays if "layers_1." in n]:
            del arrays[name]

    checkpoint = changed(tmp_path, drop, "llama2", scanned=False)
    refused(convert(checkpoint), TensorError, "lacks layers", "layers_1", out=out_of(checkpoint))


def test_no_layers_at_all(tmp_path):
    def drop(arrays):
        for name in [n for n in arrays if "layers" in n]:
            del arrays[name]

    checkpoint = changed(tmp_path, drop)
    refused(convert(checkpoint), TensorError, "no decoder layers", out=out_of(checkpoint))


@pytest.mark.parametrize(
    "name",
    ["decoder.layers.self_attention.query_norm.scale", "decoder.layers.mlp.wi_0.kernel",
     "vision_encoder.patch.kernel", "decoder.layers.MoeBlock_0.gate.bias"],
)  # fmt: skip
def test_an_extra_parameter(tmp_path, name):
    """Never dropped."""

    def add(arrays):
        arrays[name] = np.zeros((16, 4), np.float32)

    checkpoint = changed(tmp_path, add)
    short = name.removeprefix("decoder.layers.")
    refused(convert(checkpoint), TensorError, short, out=out_of(checkpoint))


def test_an_entry_without_its_files(plain):
    shutil.rmtree(plain.items / f"params.params.{WI_0}")
    words = (WI_0, "cannot be opened")
    refused(convert(plain), NotACheckpointError, *words, out=out_of(plain))


def test_files_without_an_entry(checkpoint):
    path = checkpoint.items / "_METADATA"
    content = json.loads(path.read_text())
    content["tree_metadata"] = {
        k: v for k, v in content["tree_metadata"].items() if "wi_0" not in k
    }
    path.write_text(json.dumps(content))
    words = ("missing MoeBlock_0.wi_0",)
    refused(convert(checkpoint), TensorError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (WI_0, (4, 4, 16, 23)),
        (WI_0, (4, 3, 16, 24)),
        (WI_0, ()),
        (WI_0, (4, 4, 16)),
        ("token_embedder.embedding", (64, 15)),
        ("decoder.decoder_norm.scale", (16, 1)),
        ("decoder.decoder_norm.scale", ()),
        ("decoder.layers.self_attention.key.kernel", (16, 4, 3, 4)),
        ("decoder.layers.self_attention.out.kernel", (4, 4, 5, 16)),
        ("decoder.layers.self_attention.query.kernel", (16, 4, 4, 3)),
    ],
)
def test_a_wrong_shape(tmp_path, name, shape):
    def reshape(arrays):
        arrays[name] = np.zeros(shape, np.float32)

    checkpoint = changed(tmp_path, reshape)
    refused(convert(checkpoint), TensorError, out=out_of(checkpoint))


def test_another_frameworks_checkpoint(tmp_path):
    """Orbax, but no MaxText."""
    import orbax_writer

    beside = {("model", "w"): np.zeros((2, 2), np.float32)}
    step = orbax_writer.write(tmp_path / "run" / "1", {}, beside=beside)
    ran = moeconv("convert", step, tmp_path / "out")
    words = ("no parameters below params.params (it holds model)",)
    refused(ran, NotACheckpointError, *words, out=tmp_path / "out")


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(tmp_path, dtype, value):
    def spoil(arrays):
        arrays[WI_0][1, 2, 3, 4] = value

    checkpoint = changed(tmp_path, spoil, dtype=dtype)
    words = (WI_0, "NaN or Inf", "--allow-nonfinite")
    refused(convert(checkpoint), TensorError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_inf_are_copied_bit_for_bit(tmp_path, dtype):
    """Payloads and signs of NaN too."""
    bits = {"float32": ("u4", [0x7FC00001, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000]),
            "bfloat16": ("u2", [0x7FC1, 0xFFFF, 0x7F81, 0x7F80, 0xFF80]),
            "float16": ("u2", [0x7E01, 0xFFFF, 0x7C01, 0x7C00, 0xFC00])}[dtype]  # fmt: skip

    def spoil(arrays):
        for name in (WI_0, "token_embedder.embedding", "decoder.layers.self_attention.out.kernel"):
            flat = arrays[name].reshape(-1).view(bits[0])
            flat[3 : 3 + len(bits[1])] = bits[1]

    checkpoint = changed(tmp_path, spoil, dtype=dtype)
    assert convert(checkpoint, "--allow-nonfinite").code == 0
    with safe_open(out_of(checkpoint) / "model.safetensors", framework="np") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    embedding = checkpoint.arrays["token_embedder.embedding"]
    assert written["model.embed_tokens.weight"].tobytes() == embedding.tobytes()
    wi_0 = checkpoint.arrays[WI_0]
    name = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    for expert in range(4):
        for layer in range(4):
            expected = np.ascontiguousarray(wi_0[expert, layer].T).tobytes()
            assert written[name.format(layer, expert)].tobytes() == expected


@pytest.mark.parametrize("flags", [(), ("--allow-nonfinite",)])
def test_overflow_of_float16(tmp_path, flags):
    """Allowing NaN and Inf does not allow to make new ones."""

    def large(arrays):
        arrays[WI_0][0, 0, 0, 0] = 70_000
        arrays["token_embedder.embedding"][0, 0] = 1

    checkpoint = changed(tmp_path, large)
    ran = convert(checkpoint, "--dtype", "float16", *flags)
    words = (WI_0, "overflow float16", "--dtype bfloat16 or float32", "experts.0.w1.weight")
    refused(ran, TensorError, *words, out=out_of(checkpoint))
    assert convert(checkpoint, "--dtype", "bfloat16").code == 0


def test_nan_is_not_called_an_overflow(tmp_path):
    """Though the thread that casts may see it before the thread that looks for it."""

    def spoil(arrays):
        arrays[WI_0][0, 0, 0, 0] = np.nan

    checkpoint = changed(tmp_path, spoil)
    ran = convert(checkpoint, "--dtype", "float16")
    refused(ran, TensorError, WI_0, "holds NaN or Inf", out=out_of(checkpoint))


def test_infinities_of_the_source_are_no_overflow(tmp_path):
    def spoil(arrays):
        arrays[WI_0][1, 2, 3, 4] = np.inf
        arrays["decoder.layers.self_attention.query.kernel"][3, 2, 1, 0] = np.nan

    checkpoint = changed(tmp_path, spoil)
    assert convert(checkpoint, "--dtype", "float16", "--allow-nonfinite").code == 0


def test_a_fold_that_overflows(tmp_path):
    """The query kernel times sqrt(head_dim), in the checkpoint's own float16."""

    def large(arrays):
        arrays["decoder.layers.self_attention.query.kernel"][0, 0, 0, 0] = 60_000

    checkpoint = changed(tmp_path, large, dtype="float16")
    words = ("self_attention.query.kernel", "overflow float16", "q_proj")
    refused(convert(checkpoint), TensorError, *words, out=out_of(checkpoint))


# --- what is told -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("base_emb_dim", 32), ("base_num_query_heads", 8), ("base_num_kv_heads", 4), ("head_dim", 8),
     ("vocab_size", 128), ("base_num_decoder_layers", 6), ("base_mlp_dim", 96),
     ("num_experts", 8), ("logits_via_embedding", False), ("scan_layers", False),
     ("emb_dim", 32), ("num_decoder_layers", 6), ("vocab_size", "many"), ("head_dim", [8])],
)  # fmt: skip
def test_a_config_that_contradicts_the_shapes(checkpoint, key, value):
    words = (f"{key}={value}", "config.yml", "contradicts the checkpoint")
    ran = convert(checkpoint, told={key: value})
    refused(ran, ConfigError, *words, out=out_of(checkpoint))
    ran = convert(checkpoint, "--set", f"{key}={json.dumps(value)}")
    refused(ran, ConfigError, f"{key}={value}", "--set", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("decoder_block", "gemma2", ["gemma2", "mixtral, envy, llama2"]),
        ("decoder_block", "deepseek", ["deepseek"]),
        ("decoder_block", ["mixtral"], ["mixtral, envy, llama2"]),
    ],
)
def test_an_unknown_decoder_block(checkpoint, key, value, words):
    ran = convert(checkpoint, told={key: value})
    refused(ran, UnsupportedError, *words, out=out_of(checkpoint))


def test_a_decoder_block_of_another_kind(checkpoint, made, tmp_path):
    ran = convert(checkpoint, told={"decoder_block": "llama2"})
    refused(ran, ConfigError, "llama2", "no moe layers", out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_experts_per_tok", 5, ["num_experts_per_tok=5", "more than the 4 experts"]),
        ("num_experts_per_tok", 0, ["a whole number ≥ 1"]),
        ("num_experts_per_tok", 1.5, ["a whole number ≥ 1"]),
        ("num_experts_per_tok", True, ["a whole number ≥ 1"]),
        ("num_experts_per_tok", "two", ["a whole number ≥ 1"]),
        ("num_experts_per_tok", float("inf"), ["a whole number ≥ 1"]),
        ("num_experts_per_tok", [2], ["a whole number ≥ 1"]),
        ("rope_max_timescale", 0, ["a number > 0"]),
        ("rope_max_timescale", -1, ["a number > 0"]),
        ("rope_max_timescale", "large", ["a number > 0"]),
        ("rope_max_timescale", float("nan"), ["a number > 0"]),
        ("rope_max_timescale", {"a": 1}, ["a number > 0"]),
        ("rope_type", "yarn", ["default or llama3.1"]),
        ("rope_type", 3, ["default or llama3.1"]),
        ("normalization_layer_epsilon", 0, ["a number > 0"]),
        ("normalize_embedding_logits", "maybe", ["true or false"]),
        ("max_target_length", 0, ["a whole number ≥ 1"]),
        ("max_target_length", 10**400, ["max_target_length"]),
        ("bos_token_id", 64, ["no row of the embedding, which has 64"]),
        ("eos_token_id", -1, ["no row of the embedding"]),
        ("eos_token_id", "</s>", ["eos_token_id"]),
        ("pad_token_id", 1.5, ["pad_token_id"]),
        ("pad_token_id", [0], ["pad_token_id"]),
        ("param_scan_axis", 0, ["param_scan_axis is 0", "layer axis at 1"]),
        ("param_scan_axis", "first", ["param_scan_axis"]),
        ("param_scan_axis", [1], ["param_scan_axis"]),
        ("param_scan_axis", 7, ["param_scan_axis is 7"]),
    ],
)
def test_values_that_make_no_sense(checkpoint, key, value, words):
    ran = convert(checkpoint, told={key: value})
    refused(ran, ConfigError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize("key", ["inhomogeneous_layer_cycle_interval", "global_parameter_scale"])
@pytest.mark.parametrize("value", ["abc", [1], -1, float("inf"), 1.5])
def test_odd_values_of_what_only_helps_to_compare(checkpoint, key, value):
    """They may be refused or ignored, in a sentence."""
    told = {key: value, "base_num_decoder_layers": 4, "base_emb_dim": 16}
    ran = convert(checkpoint, told=told)
    assert "Traceback" not in ran.err
    assert ran.code in (0, ConfigError.exit_code)


def test_untold_fields(checkpoint):
    """Every one is named, and the three ways to tell them."""
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    sentence = refused(ran, ConfigError, out=out_of(checkpoint))
    keys = "decoder_block num_experts_per_tok rope_type rope_max_timescale max_target_length"
    keys += " normalization_layer_epsilon normalize_embedding_logits"
    for key in (*keys.split(), "--config FILE", "--set KEY=VALUE", "moeconv.json"):
        assert key in sentence
    ran = moeconv("inspect", checkpoint.run)
    assert ran.code == 0
    assert "nobody told them" in ran.out
    missing = json.loads(moeconv("inspect", checkpoint.run, "--json").out)["missing"]
    assert {"decoder_block", "num_experts_per_tok", "rope_max_timescale"} <= set(missing)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [1", ["is not YAML"]),
        ("\t- x", ["is not YAML"]),
        ("a: b: c", ["is not YAML"]),
        ("- 1\n- 2\n", ["no `key: value` lines"]),
        ("just text", ["no `key: value` lines"]),
        ("run_name: 2020-99-99", ["is not YAML"]),
        ("a: !!python/object:os.system x", ["is not YAML"]),
        (b"\xff\xfe\x00\x01", ["is not YAML"]),
        (b"a: \x00", ["is not YAML"]),
        ("base_config: other.yml\n", ["base_config", "other.yml"]),
        ("base_config: [1]\n", ["base_config"]),
        ("base_config: 5\n", ["base_config"]),
        ("model_name: gpt-5\n", ["model_name 'gpt-5'"]),
        ("a: " + "[" * 5000, ["is not YAML"]),
    ],
)
def test_a_config_that_cannot_be_read(checkpoint, content, words):
    path = checkpoint.run.parent / "bad.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", path)
    refused(ran, ConfigError, str(path), *words, out=out_of(checkpoint))


def test_a_config_that_is_not_there(checkpoint):
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", "no-such.yml")
    refused(ran, ConfigError, "cannot read --config no-such.yml", "No such file",
            out=out_of(checkpoint))  # fmt: skip
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", checkpoint.run)
    assert ran.code == CLICK_USAGE
    assert "is a directory" in ran.err


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("rope_max_timescale", ["not of the form key=value"]),
        ("=5", ["not of the form key=value"]),
        ("rope_theta=1e4", ["--set rope_theta", "no field of that name"]),
        ("learning_rate=1", ["no field of that name"]),
        ("rope_max_timescale=[1", ["not a YAML value"]),
        ("rope_max_timescale=2020-99-99", ["not a YAML value"]),
        ("rope_max_timescale=a: b: c", ["not a YAML value"]),
    ],
)
def test_bad_set(checkpoint, pair, words):
    refused(convert(checkpoint, "--set", pair), ConfigError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--dtype", "int8", ["--dtype int8 is none of keep, float32, bfloat16, float16"]),
        ("--target", "gpt2", ["--target gpt2 is none of auto, mixtral, ernie4_5_moe, llama"]),
        ("--jobs", "0", ["--jobs"]),
        ("--jobs", "-1", ["--jobs"]),
        ("--max-memory", "lots", ["'lots' is not a size"]),
        ("--max-memory", "-1GB", ["is not a size"]),
        ("--max-memory", "0", ["above zero"]),
        ("--max-memory", "9" * 400, ["is not a size"]),
        ("--max-shard-size", "5 XB", ["is not a size such as 5GB, 512MiB"]),
        ("--max-shard-size", "0.1", ["above zero"]),
    ],
)
def test_bad_flags(checkpoint, flag, value, words):
    ran = convert(checkpoint, flag, value)
    refused(ran, UsageError, *words, out=out_of(checkpoint))
    assert UsageError.exit_code == CLICK_USAGE


def test_bad_flags_that_click_refuses(checkpoint):
    for flags in (["--jobs", "two"], ["--jobs"], ["--frob"], ["--quiet=3"], ["extra"]):
        ran = convert(checkpoint, *flags)
        assert ran.code == CLICK_USAGE
        assert "Error: " in ran.err
        assert not out_of(checkpoint).exists()


def test_memory_limit(checkpoint):
    ran = convert(checkpoint, "--max-memory", "1MiB")
    sentence = refused(ran, 9, "--max-memory 1.05 MB is below", out=out_of(checkpoint))
    assert re.search(r"give --max-memory \d+MiB or more", sentence)


# --- what no target can hold --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [("envy", "use_qk_norm", True), ("mixtral", "final_logits_soft_cap", 30.0),
     ("mixtral", "routed_score_func", "sigmoid"), ("envy", "use_random_routing", True),
     ("llama2", "attn_logits_soft_cap", 50.0), ("mixtral", "mlp_activations", ["gelu", "linear"]),
     ("mixtral", "rope_linear_scaling_factor", 4.0), ("mixtral", "moba", True),
     ("mixtral", "attention_type", "mla"), ("mixtral", "attention_sink", True),
     ("mixtral", "mlp_bias", True), ("mixtral", "routed_bias", True),
     ("mixtral", "weight_sparsity_n", 2), ("mixtral", "mhc_expansion_rate", 4)],
)  # fmt: skip
def test_refused_features(made, tmp_path, block, key, value):
    checkpoint = made(tmp_path, block)
    words = (f"{key}={value}", "cannot be converted exactly")
    ran = convert(checkpoint, told={key: value})
    refused(ran, UnsupportedError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("key", "value"),
    [("capacity_factor", 1.25), ("sliding_window_size", 128), ("shared_experts", 1),
     ("quantization", "int8"), ("routed_scaling_factor", 2.5), ("attn_logits_soft_cap", 50.0),
     ("ragged_buffer_factor", 2.0), ("nope_layer_interval", 4)],
)  # fmt: skip
def test_warned_features(checkpoint, key, value):
    ran = convert(checkpoint, told={key: value})
    assert ran.code == 0
    [line] = [line for line in ran.err.splitlines() if f"{key}={value}" in line]
    assert line.startswith("warning: ")
    manifest = json.loads((out_of(checkpoint) / "moeconv.json").read_text())
    assert any(f"{key}={value}" in text for text in manifest["warnings"])


def test_ernie_on_an_irregular_pattern(tmp_path):
    """Experts on layers 1, 2 and 4 of 4."""

    def more(arrays):
        for name in list(arrays):
            if name.startswith("decoder.layers_1.MoeBlock_0"):
                arrays[name.replace("layers_1", "layers_0")] = arrays[name]
            if name.startswith("decoder.layers_0.mlp"):
                del arrays[name]

    checkpoint = changed(tmp_path, more, "envy", scanned=False)
    ran = convert(checkpoint, "--target", "ernie4_5_moe")
    words = ("layers 1, 2, 4", "use --target mixtral")
    refused(ran, UnsupportedError, *words, out=out_of(checkpoint))
    assert convert(checkpoint, "--target", "mixtral").code == 0


@pytest.mark.parametrize(
    ("block", "target", "words"),
    [("mixtral", "llama", ["LlamaForCausalLM has no moe layers"]),
     ("envy", "llama", ["LlamaForCausalLM has no moe layers"]),
     ("llama2", "mixtral", ["no Mixture-of-Experts layer; use --target llama"]),
     ("llama2", "ernie4_5_moe", ["no Mixture-of-Experts layer; use --target llama"])],
)  # fmt: skip
def test_targets_that_do_not_fit(made, tmp_path, block, target, words):
    checkpoint = made(tmp_path, block)
    ran = convert(checkpoint, "--target", target)
    refused(ran, UnsupportedError, f"--target {target}", *words, out=out_of(checkpoint))


# --- the tokenizer ------------------------------------------------------------------------------


def tokenizer(folder: Path, size: int, **config: object) -> Path:
    """A tokenizer directory of `size` tokens."""
    folder.mkdir()
    vocab = {f"t{n}": n for n in range(size)}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_that_is_too_large(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 66, bos_token="t65")
    ran = convert(checkpoint, "--tokenizer", path)
    words = (str(path), "no row in the model for ids 64 to 65", "BOS 65", "vocab_size is 64")
    refused(ran, TokenizerError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize("spec", ["no-such-directory", "no/such.json", "~no-such-user/tokenizer"])
def test_a_tokenizer_that_is_not_there(checkpoint, spec):
    ran = convert(checkpoint, "--tokenizer", spec)
    refused(ran, TokenizerError, spec, "no such" if spec[0] == "n" else "", out=out_of(checkpoint))


def test_a_tokenizer_that_is_damaged(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 60)
    (path / "tokenizer.json").write_text("{")
    ran = convert(checkpoint, "--tokenizer", path)
    refused(ran, TokenizerError, "tokenizer.json is not JSON", out=out_of(checkpoint))


def test_token_ids_come_from_the_tokenizer(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 60, bos_token="t0")
    assert convert(checkpoint, "--tokenizer", path).code == 0
    config = json.loads((out_of(checkpoint) / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


# --- the sidecar --------------------------------------------------------------------------------


def sidecar(checkpoint, where: Path | None = None, **more: object) -> Path:
    config = {**checkpoint.config, "num_experts_per_tok": 1, "rope_max_timescale": 123.0}
    content = {"format": "moeconv-run", "version": 1, "config": config, **more}
    path = (where or checkpoint.run) / "moeconv.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/0"])
def test_a_sidecar_is_enough(checkpoint, tmp_path, where):
    path = sidecar(checkpoint, checkpoint.run / where, tokenizer="tokenizer")
    tokenizer(path.parent / "tokenizer", 60)
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    assert ran.code == 0, ran.err
    config = json.loads((out_of(checkpoint) / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1
    assert config["rope_theta"] == 123.0
    assert (out_of(checkpoint) / "tokenizer.json").exists()
    manifest = json.loads((out_of(checkpoint) / "moeconv.json").read_text())
    assert manifest["model"]["rope_theta"]["source"] == f"sidecar: {path}"


def test_the_nearest_sidecar_is_taken(checkpoint):
    sidecar(checkpoint)
    path = sidecar(checkpoint, checkpoint.step_dir)
    path.write_text(path.read_text().replace("123.0", "456.0"))
    assert moeconv("convert", checkpoint.run, out_of(checkpoint)).code == 0
    config = json.loads((out_of(checkpoint) / "config.json").read_text())
    assert config["rope_theta"] == 456.0


def test_config_beats_the_sidecar_and_set_beats_both(checkpoint):
    sidecar(checkpoint)
    for n, (flags, theta, k) in enumerate((
        ([], 123.0, 1),
        (["--config"], 500_000.0, 2),
        (["--set", "rope_max_timescale=789"], 789.0, 1),
        (["--config", "--set", "rope_max_timescale=789"], 789.0, 2),
    )):  # fmt: skip
        config = checkpoint.config_file(checkpoint.run.parent)
        args = [a for f in flags for a in ([f, config] if f == "--config" else [f])]
        out = checkpoint.run.parent / f"out{n}"
        assert moeconv("convert", checkpoint.run, out, *args).code == 0
        written = json.loads((out / "config.json").read_text())
        assert (written["rope_theta"], written["num_experts_per_tok"]) == (theta, k), flags


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '{"format": "moeconv-run"}', "[" * 100_000,
     '{"format": "moeconv-run", "version": 2, "config": {}}',
     '{"format": "moeconv-run", "version": 1, "config": []}',
     '{"format": "moeconv-run", "version": 1, "config": {}, "tokenizer": 3}', b"\xff\x00"],
)  # fmt: skip
def test_a_damaged_sidecar(checkpoint, content):
    path = checkpoint.run / "moeconv.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    words = (str(path), "not the sidecar", "--config")
    refused(ran, ConfigError, *words, out=out_of(checkpoint))
    ran = convert(checkpoint)
    assert ran.code == 0, "--config gets around it"
    assert f"warning: {path} is not the sidecar" in ran.err


@pytest.mark.parametrize("how", ["no permission", "directory"])
def test_a_sidecar_that_cannot_be_read(checkpoint, monkeypatch, how):
    path = checkpoint.run / "moeconv.json"
    if how == "directory":
        path.mkdir()
    else:
        unreadable(monkeypatch, sidecar(checkpoint))
    reason = "it is a directory" if how == "directory" else "Permission denied"
    words = (f"cannot read {path}: {reason}", "--config")
    for command in (["convert", checkpoint.run, out_of(checkpoint)], ["inspect", checkpoint.run]):
        refused(moeconv(*command), ConfigError, *words, out=out_of(checkpoint))
    ran = convert(checkpoint)
    assert ran.code == 0
    assert f"warning: cannot read {path}: {reason}; --config replaces it" in ran.err


def unreadable(monkeypatch, path: Path) -> None:
    """As chmod 000 does, for root too."""
    read = Path.read_bytes

    def denied(self: Path) -> bytes:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", denied)


def test_metrics_that_cannot_be_read(checkpoint, monkeypatch):
    path = checkpoint.run / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    unreadable(monkeypatch, path)
    ran = convert(checkpoint)
    assert ran.code == 0
    assert f"warning: cannot read {path}: Permission denied; the manifest tells no losses" in (
        ran.err
    )


@pytest.mark.parametrize(
    ("config", "error"),
    [({}, 0), ({"decoder_block": "gemma"}, UnsupportedError), ({"num_experts": 8}, ConfigError),
     ({"rope_max_timescale": "x"}, ConfigError), ({"model_name": 5}, ConfigError),
     ({"use_qk_norm": True, "decoder_block": "envy"}, UnsupportedError)],
)  # fmt: skip
def test_a_sidecar_with_a_bad_config(checkpoint, config, error):
    path = sidecar(checkpoint, config={**checkpoint.config, **config})
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    if error == 0:
        assert ran.code == 0
    else:
        sentence = refused(ran, error, out=out_of(checkpoint))
        assert str(path) in sentence or "cannot be converted exactly" in sentence


def test_a_sidecar_whose_tokenizer_is_gone(checkpoint):
    sidecar(checkpoint, tokenizer="tokenizer")
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    words = (str(checkpoint.run / "tokenizer"), "no such file or directory")
    refused(ran, TokenizerError, *words, out=out_of(checkpoint))


# --- the same from everywhere, and clean streams ------------------------------------------------


def test_ckpt_named_in_every_way(checkpoint, monkeypatch):
    config = checkpoint.config_file(checkpoint.run.parent)
    run, step = checkpoint.run, checkpoint.step_dir
    monkeypatch.chdir(run)
    ways = [run, run / "checkpoints", step, step / "items", f"{run}/", f"file://{run}",
            f"file://{step}/items/", ".", "checkpoints/../checkpoints/0"]  # fmt: skip
    written = []
    for n, way in enumerate(ways):
        out = run.parent / f"out{n}"
        ran = moeconv("convert", way, out, "--config", config)
        assert ran.code == 0, ran.err
        written.append(listing(out))
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize(
    "name", ["with space", "a#b", "a?b", "50%", "%41", "a|b:c", "ünï", "a'b\"c", "a&b=c;d", "[x]*"]
)
@pytest.mark.parametrize("ocdbt", [True, False])
def test_paths_with_odd_characters(made, tmp_path, name, ocdbt):
    folder = tmp_path / name
    folder.mkdir()
    checkpoint = made(folder, ocdbt=ocdbt)
    ran = convert(checkpoint)
    assert ran.code == 0, ran.err
    assert (out_of(checkpoint) / "model.safetensors").exists()


def test_a_file_url_with_escapes(made, tmp_path):
    folder = tmp_path / "with space%"
    folder.mkdir()
    checkpoint = made(folder)
    config = checkpoint.config_file()
    url = checkpoint.run.as_uri()
    assert "%20" in url
    ran = moeconv("convert", url, tmp_path / "out", "--config", config)
    assert ran.code == 0, ran.err
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", config)
    assert ran.code == 0, ran.err
    assert listing(tmp_path / "out") == listing(out_of(checkpoint))


def test_json_alone_on_stdout(checkpoint):
    config = checkpoint.config_file(checkpoint.run.parent)
    out = out_of(checkpoint)
    for args in (
        ["inspect", checkpoint.run],
        ["inspect", checkpoint.run, "--config", config],
        ["convert", checkpoint.run, out, "--config", config, "--dry-run"],
        ["convert", checkpoint.run, out, "--config", config],
    ):
        ran = moeconv(*args, "--json")
        assert ran.code == 0, ran.err
        assert isinstance(json.loads(ran.out), dict)
        if "--dry-run" in args:
            assert not out.exists()
    assert json.loads(ran.out)["files"].keys() == listing(out).keys() - {"moeconv.json"}
    ran = moeconv("convert", checkpoint.run, out, "--config", config, "--json")
    assert ran.code == OutputError.exit_code
    assert ran.out == ""


def test_dry_run_says_what_convert_does(checkpoint):
    plan = json.loads(convert(checkpoint, "--dry-run", "--json").out)
    assert convert(checkpoint).code == 0
    out = out_of(checkpoint)
    assert {f["name"]: f["bytes"] for f in plan["files"]} == {
        "model.safetensors": (out / "model.safetensors").stat().st_size
    }
    raw = (out / "model.safetensors").read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    assert {t["name"] for t in plan["tensors"]} == set(header)
    for tensor in plan["tensors"]:
        start, stop = header[tensor["name"]]["data_offsets"]
        assert tensor["offset"] == 8 + length + start
        assert tensor["bytes"] == stop - start
        assert tensor["shape"] == header[tensor["name"]]["shape"]


def test_quiet_says_nothing_but_warnings(checkpoint):
    ran = convert(checkpoint, "--quiet")
    assert (ran.code, ran.out, ran.said) == (0, "", [])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_letters(checkpoint, encoding):
    config = checkpoint.config_file(checkpoint.run.parent)
    for args in (["inspect", checkpoint.run], ["inspect", checkpoint.run, "--json"],
                 ["convert", checkpoint.run, out_of(checkpoint), "--dry-run"]):  # fmt: skip
        ran = cli_runner.run(*args, "--config", config, PYTHONIOENCODING=encoding)
        assert ran.code == 0, ran.err
        if "--json" in args:
            assert json.loads(ran.out)["kind"] == "parameters only"


def piped(redirect: str, *args: object) -> Ran:
    """`moeconv ARGS REDIRECT` in a shell, which gives the command's own exit code."""
    words = shlex.join(cli_runner.command(*args))
    ran = subprocess.run(
        ["bash", "-c", f"{words} {redirect}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, env=cli_runner.environment(), timeout=300,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr, ran.stderr
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.mark.parametrize("redirect", ["| head -1", "2>&1 | true", "2>&-"])
def test_a_reader_that_goes_away(checkpoint, redirect):
    """The work is whole, and its code is its own."""
    config = checkpoint.config_file(checkpoint.run.parent)
    out = out_of(checkpoint)
    assert piped(redirect, "inspect", checkpoint.run, "--config", config, "--json").code == 0
    assert piped(redirect, "convert", checkpoint.run, out, "--config", config).code == 0
    assert (out / "moeconv.json").exists()
    assert piped(redirect, "convert", "nope", out).code == NotACheckpointError.exit_code
    assert piped(redirect, "convert").code == CLICK_USAGE


@pytest.mark.parametrize(
    ("redirect", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")]
)
def test_an_answer_that_cannot_be_written(checkpoint, redirect, why):
    config = checkpoint.config_file(checkpoint.run.parent)
    out = out_of(checkpoint)
    sentence = f"error: the answer cannot be written to stdout ({why}); all else is done\n"
    for args in (["inspect", checkpoint.run], ["--help"], ["convert", checkpoint.run, out]):
        ran = piped(redirect, *args, *([] if args == ["--help"] else ["--config", config]))
        assert ran.code == CLICK_USAGE
        assert ran.err.endswith(sentence)
    assert (out / "moeconv.json").exists()
    ran = piped(redirect, "convert", "nope", out)
    assert ran.code == NotACheckpointError.exit_code
    assert sentence not in ran.err, "there was no answer"
    ran = piped(f"{redirect} 2>&-", "convert", "nope", out)
    assert (ran.code, ran.err) == (NotACheckpointError.exit_code, "")


@pytest.mark.slow
def test_a_verdict_that_cannot_be_written(checkpoint):
    config = checkpoint.config_file(checkpoint.run.parent)
    out = out_of(checkpoint)
    assert moeconv("convert", checkpoint.run, out, "--config", config).code == 0
    ran = piped(">&-", "verify", out, "--level", "structure")
    assert ran.code == 2, "never 1, which is a verdict"


# --- light imports ------------------------------------------------------------------------------

HEAVY = ("jax", "torch", "transformers", "maxtext", "flax", "orbax")


def loaded(*args: object) -> set[str]:
    """Top-level modules in a process that ran `moeconv ARGS`."""
    code = (
        "import sys\n"
        "from moeconv.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "finally:\n    print(*sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True, text=True, env=cli_runner.environment(), check=True,
    )  # fmt: skip
    return set(ran.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["convert", "--help"]])
def test_help_is_light(args):
    found = loaded(*args)
    assert "click" in found
    assert not found & {*HEAVY, "tensorstore", "numpy", "huggingface_hub", "pydantic", "rich"}


def test_convert_needs_no_framework(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 60)
    config = checkpoint.config_file(checkpoint.run.parent)
    args = ["convert", checkpoint.run, out_of(checkpoint), "--config", config, "--tokenizer", path]
    found = loaded(*args)
    assert "tensorstore" in found
    assert not found & set(HEAVY)
    assert not loaded("inspect", checkpoint.run) & set(HEAVY)


# --- the documentation --------------------------------------------------------------------------


def test_exit_codes_are_documented():
    """docs/exit-codes.md has a row for every class of error, with its code and its meaning."""
    rows = {}
    for line in (DOCS / "exit-codes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].isdigit():
            rows[int(cells[0])] = cells
    classes = {
        cls.exit_code: cls
        for _, cls in python_inspect.getmembers(errors, python_inspect.isclass)
        if issubclass(cls, MoeconvError)
    }
    count = len([c for c in vars(errors).values() if isinstance(c, type)])
    assert len(classes) == count, "every class has a code of its own"
    assert set(rows) == {0, 130, *classes}
    for code, cls in classes.items():
        if code > CLICK_USAGE:
            assert rows[code][1] == python_inspect.getdoc(cls).splitlines()[0]
        assert rows[code][2], "a typical fix"


def test_help_is_documented_as_it_is_printed():
    """`make docs-check` holds the rest."""
    last = moeconv("inspect", "--help").out.splitlines()[-1].split()
    assert last[:2] == ["-h,", "--help"]
    lines = [line.split() for line in (DOCS / "cli.md").read_text().splitlines()]
    assert not [line for line in lines if line[:1] == ["--help"]]
    assert [line for line in lines if line[:2] == last[:2]]


def test_yaml_is_what_the_tests_write(checkpoint):
    """The refusals above are the config's doing: as it is, it converts."""
    ran = convert(checkpoint)
    assert ran.code == 0, ran.err
    assert yaml.safe_load((checkpoint.run.parent / "config.yml").read_text()) == checkpoint.config
