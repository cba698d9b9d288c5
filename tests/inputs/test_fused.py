"""Weights that MaxText keeps fused for speed are taken apart: the bytes are those of the others."""

import json

import numpy as np
import orbax_writer
import pytest
import synthetic
import yaml
from checkpoints.llama import LLAMA2
from checkpoints.mixtral import MIXTRAL
from engine_lab import tensors
from inputs_lab import as_leaf, converted

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import ConfigError, TensorError, UnsupportedError
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.verification.models.maxtext import MaxTextModel


def width(axes):
    """The position of a gate's width: its last axis, but for that of the layers."""
    return len(axes.removesuffix("L")) - 1


def fuse(arrays, axes, moe=True, mlp=True, qkv=True):
    """As MaxText would have kept them; changes `arrays`."""
    for name in list(arrays):
        above, _, last = name.rpartition(".")
        if moe and last == "wi_0":
            one, other = arrays.pop(name), arrays.pop(f"{above}.wi_1")
            arrays[f"{above}.wi"] = np.concatenate([one, other], width(axes[name]))
        elif mlp and name.endswith(("wi_0.kernel", "wi_0.bias")):
            above = above.removesuffix(".wi_0")
            one, other = arrays.pop(name), arrays.pop(f"{above}.wi_1.{last}")
            at = width(axes[name])
            if axes[name].endswith("L"):  # at param_scan_axis 2 of [D, 2, F]
                one, other, at = one.swapaxes(1, 2), other.swapaxes(1, 2), 1
            arrays[f"{above}.wi.{last}"] = np.stack([one, other], at)
        elif qkv and name.endswith(("query.kernel", "query.bias")):
            above = above.removesuffix(".query")
            if f"{above}.value.{last}" not in arrays or "Q" in axes[name]:
                continue  # keys that are the values, or queries with a gate, are no such heads
            three = [arrays.pop(f"{above}.{each}.{last}") for each in ("query", "key", "value")]
            at = axes[name].index("H")
            arrays[f"{above}.qkv_proj.{last}"] = np.concatenate(three, at)


def write(run, block, *, scanned=True, sizes=None, split=None, **what):
    axes = synthetic.parameter_axes(block, layers=4, tied=True, scanned=scanned)
    return synthetic.write(
        run, block, scanned=scanned, sizes=sizes, split=split,
        change=lambda arrays: fuse(arrays, axes, **what),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("block", "scanned"),
    [
        *((block, True) for block in sorted(synthetic.BLOCKS) if block != "gpt3"),  # it has one
        ("mixtral", False),
        ("qwen2", False),
    ],
)
def test_fused(tmp_path, block, scanned):
    plain = synthetic.write(tmp_path / "plain", block, scanned=scanned)
    fused = write(tmp_path / "fused", block, scanned=scanned)
    assert len(fused.arrays) < len(plain.arrays)
    found, opened = converted(fused, tmp_path / "out")
    assert found == converted(plain, tmp_path / "usual")[0]
    assert opened.fused
    assert sum(i.nbytes for i in opened.arrays.info.values()) == sum(
        a.nbytes for a in plain.arrays.values()
    )


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 3), (8, 1)])
@pytest.mark.parametrize("layers", [2, 4, 16])
def test_sizes_that_are_alike(tmp_path, heads, layers):
    """Two layers beside two projections, 16 layers beside width 16, and so on."""
    sizes = {"H": heads[0], "K": heads[1], "L": layers, "D": 16, "F": 32, "M": 8}
    for block in ("llama2", "mixtral"):
        plain = synthetic.write(tmp_path / f"{block} plain", block, sizes=sizes)
        fused = write(tmp_path / f"{block} fused", block, sizes=sizes)
        told = {"sets": ("param_scan_axis=1",)}
        assert (
            converted(fused, tmp_path / f"{block} out", **told)[0]
            == converted(plain, tmp_path / f"{block} usual", **told)[0]
        )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_whatever_the_chunks(tmp_path, count):
    """A chunk may hold values of both halves."""
    axes = synthetic.parameter_axes("mixtral", layers=4, tied=True, scanned=True)
    plain = synthetic.write(tmp_path / "plain")
    arrays = {name: value.copy() for name, value in plain.arrays.items()}
    fuse(arrays, axes)
    paths = {tuple(name.split(".")): value for name, value in arrays.items()}
    chunks = {path: tuple(-(-n // count) for n in value.shape) for path, value in paths.items()}
    orbax_writer.write(tmp_path / "fused" / "0", paths, chunks, scan_layers=True)
    found, _ = converted(plain, tmp_path / "out", spec=tmp_path / "fused" / "0")
    assert found == converted(plain, tmp_path / "usual")[0]


@pytest.mark.parametrize("at", ["scan axis 0", "scan axis 2"])
def test_other_scan_axes(tmp_path, at):
    axis = int(at[-1])
    plain, fused = {}, {}
    for made in synthetic.layout_of("llama2", layers=3, axis=axis).arrays:
        rng = np.random.default_rng(len(plain))
        plain[made.name] = rng.standard_normal(made.shape).astype(np.float32)
        fused[made.name] = plain[made.name]
    made = synthetic.layout_of("llama2", layers=3, axis=axis)
    fuse(fused, {a.name: "".join(a.axes) for a in made.arrays})
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump({**synthetic.TOLD, **synthetic.BLOCKS["llama2"]}))
    for name, arrays in (("plain", plain), ("fused", fused)):
        paths = {tuple(each.split(".")): value for each, value in arrays.items()}
        step = orbax_writer.write(tmp_path / name / "0", paths, scan_layers=True)
        convert(plan_conversion(str(step), ConvertOptions(config=config)), tmp_path / f"{name}-out")
    assert tensors(tmp_path / "plain-out") == tensors(tmp_path / "fused-out")


def test_in_an_nnx_state(tmp_path):
    axes = synthetic.parameter_axes("mixtral", layers=4, tied=True, scanned=True)
    made = synthetic.write(
        tmp_path / "run", item="model_params", rename=as_leaf(value=True),
        change=lambda arrays: fuse(arrays, axes),
    )  # fmt: skip
    usual = converted(synthetic.write(tmp_path / "plain"), tmp_path / "usual")[0]
    assert converted(made, tmp_path / "out")[0] == usual


def test_a_mesh_that_nothing_gives_is_asked_for(tmp_path):
    made = write(tmp_path / "run", "mixtral")
    told = tuple(f"{key}={json.dumps(value)}" for key, value in made.config.items())
    with pytest.raises(ConfigError, match="fused_qkv: the order of heads"):
        open_checkpoint(str(made.run), sets=told)
    open_checkpoint(str(made.run), sets=(*told, "ici_tensor_parallelism=1"))


@pytest.mark.parametrize("key", ["ici_tensor_parallelism", "dcn_autoregressive_parallelism"])
@pytest.mark.parametrize("value", [2, -1])
def test_heads_that_were_cut_over_devices_are_in_another_order(tmp_path, key, value):
    made = write(tmp_path / "run", "mixtral")
    config = made.config_file(**{key: value})
    with pytest.raises(UnsupportedError, match=rf"fused_qkv with {key}={value}: .*fused_qkv=false"):
        open_checkpoint(str(made.run), config=config)
    with pytest.raises(UnsupportedError, match=rf"fused_qkv with {key}={value}: "):
        open_checkpoint(str(made.run), config=made.config_file(), sets=(f"{key}={value}",))
    others = write(tmp_path / "other", "mixtral", qkv=False)
    open_checkpoint(str(others.run), config=others.config_file(**{key: value}))


def test_the_config_may_say_so(tmp_path):
    made = write(tmp_path / "run", "mixtral")
    said = {"prefuse_moe_weights": True, "fused_qkv": True}
    config = made.config_file(**said)
    assert open_checkpoint(str(made.run), config=config).resolution.refusals == ()
    plain = synthetic.write(tmp_path / "plain")
    refusals = open_checkpoint(str(plain.run), config=plain.config_file(**said)).resolution.refusals
    assert len(refusals) == 2


@pytest.mark.parametrize("damage", ["odd", "alone", "twice"])
def test_what_is_no_fused_array_is_named(tmp_path, damage):
    def change(arrays):
        axes = synthetic.parameter_axes("mixtral", layers=4, tied=True, scanned=True)
        if damage == "twice":
            arrays["decoder.layers.MoeBlock_0.wi"] = np.ones((4, 4, 16, 48), np.float32)
            return
        fuse(arrays, axes)
        if damage == "odd":
            wi = arrays["decoder.layers.MoeBlock_0.wi"]
            arrays["decoder.layers.MoeBlock_0.wi"] = np.ascontiguousarray(wi[..., :-1])
        else:
            del arrays["decoder.layers.MoeBlock_0.wo"]

    made = synthetic.write(tmp_path / "run", change=change)
    with pytest.raises(TensorError, match=r"MoeBlock_0\.w(i|o)"):
        open_checkpoint(str(made.run), config=made.config_file())


@pytest.mark.parametrize(
    ("block", "setting"),
    [(MIXTRAL, {"prefuse_moe_weights": True}), (LLAMA2, {"fused_mlp": True, "fused_qkv": True})],
    ids=["MoE", "dense"],
)
def test_maxtext_computes_the_same_of_them(maxtext_lab, tmp_path, block, setting):
    """The order within an array is MaxText's own: its forward pass is the judge."""
    plain = maxtext_lab.checkpoint(block)
    name = str(block["decoder_block"])
    axes = synthetic.parameter_axes(name, layers=4, tied=False, scanned=True)
    fused = dict(plain.params)
    what = {"moe": "prefuse_moe_weights", "mlp": "fused_mlp", "qkv": "fused_qkv"}
    fuse(fused, axes, **{each: key in setting for each, key in what.items()})
    paths = {tuple(each.split(".")): value for each, value in fused.items()}
    step = orbax_writer.write(tmp_path / "run" / "0", paths, scan_layers=True)
    tokens = np.arange(24).reshape(2, 12)
    expected = MaxTextModel.load(plain.items, plain.config).logits(tokens)
    found = MaxTextModel.load(step / "items", {**plain.config, **setting}).logits(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for each, spec, more in (("plain", plain.run_dir, {}), ("fused", step, setting)):
        config = tmp_path / f"{each}.yml"
        config.write_text(yaml.safe_dump({**plain.config, **more}))
        convert(plan_conversion(str(spec), ConvertOptions(config=config)), tmp_path / each)
    assert tensors(tmp_path / "plain") == tensors(tmp_path / "fused")
