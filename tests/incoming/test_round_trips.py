"""Every family from Hugging Face to MaxText and back, bit for bit, in every layout."""

import json

import pytest
import synthetic
from incoming_lab import BLOCKS, arrays, converted, same, tensors

from moeconv.families import blocks

_FLAGS = {
    "as MaxText does": (),
    "unscanned, zarr2": ("--no-scan-layers", "--zarr2"),
    "no OCDBT, for a mesh": ("--no-ocdbt", "--shards", "fsdp=2,expert=2,tensor=2"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A 16-bit model of each block, made once."""
    made = {}

    def make(block):
        if block not in made:
            folder = tmp_path_factory.mktemp(block)
            ckpt = synthetic.write(folder / "run", block, dtype="bfloat16", tied=False)
            flags = ("--config", ckpt.config_file(), "--dtype", "bfloat16")
            made[block] = converted(ckpt.run, folder / "model", *flags)
        return made[block]

    return make


@pytest.mark.parametrize("block", BLOCKS)
def test_a_16_bit_model_comes_back_bit_for_bit(models, tmp_path, block):
    """Whatever is folded is folded in fp32, and the way back knows what was 16 bits."""
    model = models(block)
    run = converted(model, tmp_path / "run")
    back = converted(run, tmp_path / "back")
    assert same(tensors(model), tensors(back))
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (model, back))
    assert ours == theirs


@pytest.mark.parametrize("flags", [*_FLAGS][1:])
@pytest.mark.parametrize("block", ["mixtral", "deepseek", "gemma3", "qwen3_next"])
def test_so_in_every_layout(models, tmp_path, block, flags):
    model = models(block)
    run = converted(model, tmp_path / "run", *_FLAGS[flags])
    back = converted(run, tmp_path / "back")
    assert same(tensors(model), tensors(back))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, block):
    """From MaxText's own arrays in fp32, where no factor is folded into them."""
    folds = blocks()[block].query_scale_in_kernel or block.startswith("gemma")
    dtype = "bfloat16" if folds else "float32"
    # A synthetic Gemma 3 has other blocks than MaxText gives it.
    scanned = block != "gemma3"
    ckpt = synthetic.write(tmp_path / "one", block, dtype=dtype, tied=False, scanned=scanned)
    flags = ("--config", ckpt.config_file(), "--dtype", "float32")
    model = converted(ckpt.run, tmp_path / "model", *flags)
    way = "--scan-layers" if scanned else "--no-scan-layers"
    run = converted(model, tmp_path / "run", "--block", block, "--dtype", dtype, way)
    found = {name.split(".", 2)[2]: values for name, values in arrays(run).items()}
    for name in (name for name in found if name.endswith("MoeBlock_0.gate.bias")):
        found[name] = found[name].T  # in a collection of its own, and so stacked on axis 0
    assert same(found, ckpt.arrays)


@pytest.mark.parametrize("block", ["deepseek", "gemma3", "olmo3"])
def test_the_config_alone_says_what_the_sidecar_does(models, tmp_path, block):
    """Also where the model needs a name, whose own file in MaxText says otherwise."""
    run = converted(models(block), tmp_path / "run")
    (run / "moeconv_run.json").unlink()
    flags = ("--config", run / "config.yml", "--dtype", "bfloat16")
    back = converted(run, tmp_path / "back", *flags)
    assert same(tensors(models(block)), tensors(back))
