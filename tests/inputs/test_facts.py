"""What is said of a checkpoint, and that it is true; adapters are called what they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import synthetic
from cli_runner import moeconv
from inputs_lab import as_leaf
from test_fused import write as write_fused

from moeconv.errors import UnsupportedError
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.maxtext.facts import facts_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
QUERY = ("decoder", "layers", "self_attention", "query")
ADAPTER = {
    ("params", "params", *QUERY, "kernel_lora_a"): np.ones((16, 4, 2), np.float32),
    ("params", "params", *QUERY, "kernel_lora_b"): np.ones((2, 4, 4, 4), np.float32),
}
LORA = {"lora": {"lora_rank": 2, "lora_alpha": 16.0, "enable_lora": True}}


def facts(made, **options):
    return facts_of(open_checkpoint(str(made.run), config=made.config_file(), **options))


@pytest.mark.parametrize(
    ("name", "releases"),
    [("maxtext-0.1.0-mixtral", "0.1.0 to 0.2.3"), ("maxtext-0.2.2-mixtral-tied", "0.1.0 to 0.2.3"),
     ("maxtext-0.1.0-llama2-params", "0.1.0 to 0.2.3")],
)  # fmt: skip
def test_releases_of_what_old_releases_wrote(name, releases):
    run = FIXTURES / name
    found = facts_of(open_checkpoint(str(run), config=run / "config.yml"))
    assert found.releases.startswith(releases)
    assert found.item == "item items"


def test_of_what_the_installed_release_wrote(maxtext_lab, tmp_path):
    from checkpoints.mixtral import MIXTRAL

    for full in (True, False):
        lab = maxtext_lab.checkpoint(MIXTRAL, full_state=full)
        found = facts_of(open_checkpoint(str(lab.run_dir)))
        assert found.releases.startswith("0.2.4 or later")
        assert ("train state" in found.tree) == full


def test_an_nnx_state(tmp_path):
    made = synthetic.write(tmp_path / "run", item="model_params", rename=as_leaf(value=True))
    path = made.step_dir / "_CHECKPOINT_METADATA"
    content = {**json.loads(path.read_text()), "item_handlers": {}, "custom_metadata": {}}
    path.write_text(json.dumps(content))
    found = facts(made)
    assert found.releases == "0.1.0 or later, by a fine-tuning or RL trainer"
    assert found.tree == "parameters only, an NNX state of fine-tuning"
    assert found.item == "item model_params"


def test_fused_left_out_and_the_step_itself(tmp_path):
    made = write_fused(tmp_path / "run", "mixtral")
    assert facts(made).fused == ["fused_qkv", "prefuse_moe_weights"]
    vision = {("params", "params", "vision_encoder", n): np.ones(2, np.float32) for n in "ab"}
    made = synthetic.write(tmp_path / "seeing", beside=vision, item="")
    options = {"config": made.config_file()}
    found = facts_of(open_checkpoint(str(made.step_dir), **options))
    assert found.left_out == {"vision_encoder": 2}
    assert found.item == "the step's own directory"
    assert "not converted: 2 in vision_encoder" in found.lines()


def test_inspect_says_it(tmp_path):
    made = write_fused(tmp_path / "run", "mixtral")
    ran = moeconv("inspect", made.run, "--config", made.config_file())
    assert ran.code == 0
    assert "written by MaxText 0.2.4 or later (Orbax v1, scan_layers is recorded)" in ran.out
    assert "fused, and taken apart: fused_qkv, prefuse_moe_weights" in ran.out
    ran = moeconv("inspect", made.run, "--config", made.config_file(), "--json")
    assert json.loads(ran.out)["what"]["fused"] == ["fused_qkv", "prefuse_moe_weights"]


def test_what_is_missing_is_said(tmp_path):
    made = synthetic.write(tmp_path / "run", ocdbt=False, zarr3=False, zeros=False, split={"E": 2})
    folder = made.items / "params.params.decoder.layers.MoeBlock_0.wi_0"
    next(each for each in sorted(folder.iterdir()) if each.name[0].isdigit()).unlink()
    found = facts(made, allow_missing_chunks=True)
    assert found.missing_chunks == {"decoder.layers.MoeBlock_0.wi_0": (1, 2)}
    assert "chunks are missing in 1 arrays" in found.lines()[-1]


def test_a_model_with_an_adapter(tmp_path):
    made = synthetic.write(tmp_path / "run", beside=ADAPTER, custom=LORA)
    said = r"holds a model and a LoRA adapter \(rank 2, alpha 16.0, 2 matrices\): .*kernel_lora_a"
    with pytest.raises(UnsupportedError, match=said):
        open_checkpoint(str(made.run), config=made.config_file())


@pytest.mark.parametrize(
    "rename",
    [as_leaf("params", "params"), as_leaf(value=True), as_leaf("base", value=True)],
    ids=["params.params", "top", "base"],
)
def test_an_adapter_alone(tmp_path, rename):
    import orbax_writer

    arrays = {path[2:]: value for path, value in ADAPTER.items()}
    step = orbax_writer.write(
        tmp_path / "run" / "3", arrays, rename=rename, custom=LORA,
        beside={("step",): np.ones((), np.int32)},
    )  # fmt: skip
    ran = moeconv("convert", step, tmp_path / "out")
    assert ran.code == UnsupportedError.exit_code
    assert "holds a LoRA adapter (rank 2, alpha 16.0, 2 matrices) and no model" in ran.err
    assert "--base" in ran.err
    assert "unfinished" not in ran.err
    ran = moeconv("inspect", step)
    assert ran.code == 0, ran.err
    assert "a LoRA adapter and no model" in ran.out


def test_an_adapter_of_older_releases_beside_the_parameters(tmp_path):
    made = synthetic.write(
        tmp_path / "run",
        beside={("params", "lora", *QUERY, "lora_a.kernel"): np.ones((16, 2), np.float32)},
    )
    with pytest.raises(UnsupportedError, match="holds a model and a LoRA adapter"):
        open_checkpoint(str(made.run), config=made.config_file())


def test_a_name_that_only_looks_like_an_adapter_s(tmp_path):
    from moeconv.orbax.trees import is_adapter

    assert not is_adapter(("decoder", "layers", "self_attention", "q_lora_rank", "kernel"))
    assert not is_adapter(("decoder", "lora_a", "layers", "x", "kernel"))
