"""Checkpoints at an address: read over HTTP as from disk, with the same bytes written."""

import http.server
import threading
from pathlib import Path

import numpy as np
import orbax_writer
import pytest
import synthetic
from file_server import Files

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import NotACheckpointError, StorageError
from moeconv.orbax.locate import locate

CONFIG = "decoder_block: mixtral\nnum_experts_per_tok: 2\n"
SIZES = {"V": 40, "D": 16, "H": 4, "K": 2, "h": 8, "E": 4, "M": 24}


@pytest.fixture
def served(tmp_path):
    """A checkpoint on disk, the handler class that serves it, and its address."""
    rng = np.random.default_rng(0)
    made = synthetic.layout_of("mixtral", layers=3, tied=False, sizes=SIZES)
    arrays = {a.path: rng.standard_normal(a.shape).astype(np.float32) for a in made.arrays}
    orbax_writer.write(tmp_path / "run" / "7", arrays)
    (tmp_path / "config.yml").write_text(CONFIG)
    handler = type("Served", (Files,), {"root": tmp_path})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def options(folder: Path, **more) -> ConvertOptions:
    return ConvertOptions(config=folder / "config.yml", jobs=2, **more)


def test_http_gives_the_same_bytes(served, tmp_path):
    folder, _, address = served
    convert(plan_conversion(f"{folder}/run/7", options(folder)), tmp_path / "local")
    convert(plan_conversion(f"{address}/run/7", options(folder)), tmp_path / "remote")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


def test_a_store_that_fails_keeps_what_was_done(served, tmp_path):
    folder, handler, address = served
    prepared = plan_conversion(f"{address}/run/7", options(folder))
    handler.ranges = False
    with pytest.raises(StorageError, match=r"cannot be read.*--resume"):
        convert(prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.moeconv-partial").is_dir()
    handler.ranges = True
    convert(plan_conversion(f"{address}/run/7", options(folder, resume=True)), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / ".out.moeconv-partial").exists()


def test_an_address_that_cannot_be_listed_asks_for_a_step(served):
    _, _, address = served
    with pytest.raises(NotACheckpointError, match="give the address of a step"):
        locate(f"{address}/run")


def test_a_file_address_is_a_path(served):
    folder, _, _ = served
    assert locate(f"file://{folder}/run").number == 7
    assert locate(f"{folder}/run").items == locate(f"file://{folder}/run").items
