"""Parameters that are missing, too many, of another shape, or no numbers."""

import json
import shutil

import numpy as np
import pytest
from cli_runner import moeconv
from refusals import WI_0, changed, convert, out_of, refused
from safetensors import safe_open

from moeconv.errors import NotACheckpointError, TensorError


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
     "image_encoder.patch.kernel", "decoder.layers.MoeBlock_0.gate.bias"],
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
    words = ("its _METADATA does not name", "MoeBlock_0.wi_0")
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
    words = ("no parameters of a MaxText model (it holds model)", "none below params.params")
    refused(ran, NotACheckpointError, *words, out=tmp_path / "out")


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
