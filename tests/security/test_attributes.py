"""Attributes of an array, which nobody needs: parsed they take sixty times what is written."""

import json

import pytest
import synthetic
import tensorstore as ts

from moeconv.conversion.api import ConvertOptions, plan_conversion
from moeconv.errors import NotACheckpointError, TensorError

ARRAY = "params.params.token_embedder.embedding"
ATTRIBUTES = {"a": [[]] * 30_000}


def plan(made):
    return plan_conversion(str(made.run), ConvertOptions(config=made.config_file()))


@pytest.mark.parametrize("name", ["zarr.json", ".zarray", ".zattrs"])
def test_of_a_file(tmp_path, name):
    made = synthetic.write(tmp_path / "run", ocdbt=False, zarr3=name == "zarr.json")
    path = made.items / ARRAY / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "attributes": ATTRIBUTES}))
    with pytest.raises(NotACheckpointError, match=f"{name} is larger than 64 KiB"):
        plan(made)


@pytest.mark.parametrize("zarr3", [False, True])
def test_of_a_value_of_ocdbt(tmp_path, zarr3):
    made = synthetic.write(tmp_path / "run", ocdbt=True, zarr3=zarr3)
    plan(made)
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{made.items}/"}}
    store = ts.KvStore.open(spec).result()
    key = f"{ARRAY}/{'zarr.json' if zarr3 else '.zarray'}"
    content = json.loads(store[key])
    store[key] = json.dumps({**content, "attributes": ATTRIBUTES})
    with pytest.raises(TensorError, match=r"embedding: its .* larger than 64 KiB"):
        plan(made)
