"""Right conversions, made once a session; not to be changed."""

import json
import shutil

import numpy as np
import orbax_writer
import pytest
import synthetic
from checkpoints.envy import ENVY
from checkpoints.row import TIED
from helpers import run
from moeconv_train.sidecar import public_config
from outputs_lab import SIZES, write_tokenizer

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.maxtext.sidecar import SIDECAR_NAME


@pytest.fixture(scope="session")
def right(tmp_path_factory):
    """A right conversion of an interleaved model, with square matrices."""
    root = tmp_path_factory.mktemp("right")
    rng = np.random.default_rng(1)
    sizes = SIZES | {"F": 16, "M": 16, "H": 2, "K": 2}
    arrays = {}
    for array in synthetic.layout_of("envy", layers=6, sizes=sizes).arrays:
        arrays[array.path] = rng.standard_normal(array.shape).astype(np.float32)
        if array.layers:
            arrays[array.path][0] = 0.0
    step = orbax_writer.write(root / "run" / "checkpoints" / "9", arrays)
    (root / "config.yml").write_text("decoder_block: envy\nnum_experts_per_tok: 2\n")
    options = ConvertOptions(config=root / "config.yml")
    convert(plan_conversion(str(step), options), root / "out")
    return root / "out"


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
