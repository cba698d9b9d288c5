"""What is written: shards, index, manifest, and the bytes that the ops say."""

import json

import numpy as np
import orbax_writer
import pytest
from checkpoints.envy import ENVY
from checkpoints.row import TIED
from engine_lab import contents, tensors, to
from safetensors import safe_open

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.tensor.stored import payload


def test_the_writer_of_these_tests_writes_what_maxtext_writes(maxtext_lab, tmp_path):
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    arrays = {tuple(name.split(".")): value for name, value in lab.params.items()}
    step = orbax_writer.write(tmp_path / "run" / "checkpoints" / "0", arrays, scan_layers=True)
    sets = ("decoder_block=envy", "num_experts_per_tok=2")
    config = tmp_path / "config.yml"
    config.write_text("max_target_length: 64\n")
    prepared = [
        plan_conversion(str(path), ConvertOptions(config=config, sets=sets))
        for path in (lab.step_dir, step)
    ]
    real, ours = (p.source for p in prepared)
    assert ours.arrays.info == real.arrays.info
    assert ours.tree == real.tree
    manifests = [convert(p, tmp_path / f"out{n}") for n, p in enumerate(prepared)]
    assert manifests[0].source.digest == manifests[1].source.digest
    assert tensors(tmp_path / "out0") == tensors(tmp_path / "out1")


def test_shards_index_and_files_agree(tiny, tmp_path):
    to(tiny, tmp_path / "one")
    manifest = to(tiny, tmp_path / "many", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    found, size = {}, 0
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 4
    for path in shards:
        assert path.name in manifest.files
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            names = file.keys()
            for name in names:
                found[name] = path.name
                size += file.get_tensor(name).nbytes
    assert found == index["weight_map"]
    assert size == index["metadata"]["total_size"]
    assert tensors(tmp_path / "many") == tensors(tmp_path / "one")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_the_manifest_has_every_file(tiny, tmp_path):
    import hashlib

    manifest = to(tiny, tmp_path / "out", max_shard_bytes=20_000)
    written = contents(tmp_path / "out")
    del written["moeconv_manifest.json"]
    assert {n: (r.size, r.sha256) for n, r in manifest.files.items()} == {
        name: (len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in written.items()
    }


def test_memory_order_is_not_written_as_if_it_were_logical_order():
    """safetensors#825: its own writer does that to a transposed numpy array."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bytes(payload(array)) == array.tobytes()
    for other in (array.T, array[:, ::2], array[::-1], np.asfortranarray(array)):
        with pytest.raises(ValueError, match="C-contiguous"):
            payload(other)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("target", ["mixtral", "ernie4_5_moe"])
def test_maxtexts_checkpoint_becomes_what_the_ops_say(maxtext_lab, tmp_path, target, dtype):
    lab = maxtext_lab.checkpoint(ENVY, TIED)
    config = tmp_path / "config.yml"
    config.write_text("decoder_block: envy\nnum_experts_per_tok: 2\n")
    prepared = plan_conversion(
        str(lab.run_dir), ConvertOptions(config=config, target=target, dtype=dtype)
    )
    convert(prepared, tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert written.keys() == prepared.plan.edges.keys()
    for name, edge in prepared.plan.edges.items():
        made = edge.apply(lambda source: lab.params[source])
        assert written[name] == made.tobytes(), name
