"""A source that changes while it is converted gives no model: never a mixture of two."""

import http.server
import os
import shutil
import threading

import pytest
import synthetic

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import OutputError, StorageError, TensorError

FILES = {"ocdbt": False, "zarr3": False}
OCDBT = {"ocdbt": True, "zarr3": True}


@pytest.fixture
def runs(tmp_path):
    """Writes two runs of the same shapes."""

    def write(**storage):
        both = [
            synthetic.write(tmp_path / name, seed=seed, split={"E": 4}, **storage)
            for seed, name in enumerate(("run", "other"))
        ]
        both[0].config_file()
        return both

    return write


def converting(checkpoint, out, change, ckpt=None, **options):
    """Converts; `change` is called once the first bytes are read."""
    done = []

    def progress(read, written):
        if not done:
            done.append(read)
            change()

    config = checkpoint.run / "config.yml"
    prepared = plan_conversion(
        ckpt or str(checkpoint.run), ConvertOptions(config=config, overwrite=True, **options)
    )
    return convert(prepared, out, progress=progress)


def overwrite(checkpoint, other):
    """Puts the other's files in the place of those of a checkpoint, as a second save would."""
    shutil.copytree(other.step_dir, checkpoint.step_dir, dirs_exist_ok=True)


def overwrite_in_place(checkpoint, other):
    """Writes into the same files (the same inodes), and sets their times back."""
    for path in other.items.rglob("*"):
        target = checkpoint.items / path.relative_to(other.items)
        if target.is_file() and target.stat().st_size == path.stat().st_size:
            times = target.stat()
            target.write_bytes(path.read_bytes())
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))


def metadata_alone(checkpoint, other):
    """What the step says of itself."""
    (checkpoint.step_dir / "_CHECKPOINT_METADATA").write_text("{}")


def one_more_file(checkpoint, other):
    """A save under way beside the finished one."""
    (checkpoint.items / "d").mkdir(exist_ok=True)
    (checkpoint.items / "d" / "new").write_text("")


def one_file_less(checkpoint, other):
    """A file that was read already."""
    (checkpoint.items / "_METADATA").unlink()


CHANGES = (overwrite, overwrite_in_place, metadata_alone, one_more_file, one_file_less)


@pytest.mark.parametrize("storage", [FILES, OCDBT], ids=["files", "ocdbt"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_is_written_to(runs, tmp_path, storage, change):
    one, other = runs(**storage)
    out = tmp_path / "out"
    converting(one, out, lambda: None)
    before = (out / "moeconv_manifest.json").read_bytes()
    # A chunk may be found damaged before: then the sentence is that one.
    with pytest.raises(TensorError, match=r"was written to while it was converted|is damaged"):
        converting(one, out, lambda: change(one, other))
    assert (out / "moeconv_manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out", "run"]


def test_what_others_do_beside_the_step_is_their_own_affair(runs, tmp_path):
    """A training that goes on saves other steps and writes its metrics."""
    one, other = runs(**OCDBT)

    def change():
        shutil.copytree(other.step_dir, one.run / "checkpoints" / "9")
        (one.run / "metrics.jsonl").write_text("")
        one.run.touch()

    converting(one, tmp_path / "out", change, ckpt=str(one.step_dir))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_checkpoint_that_changed_before_it_is_resumed(runs, tmp_path):
    """What is kept of the first half does not go with another second half."""
    one, _ = runs(**OCDBT)
    overwritten = [p for p in one.items.rglob("d/*") if p.is_file()]

    def dies():
        raise StorageError("the line went dead")

    with pytest.raises(StorageError):
        converting(one, tmp_path / "out", dies)
    # OCDBT's manifest stays; its data are written over by somebody.
    for path in overwritten:
        path.write_bytes(path.read_bytes())
    with pytest.raises(OutputError, match="of another checkpoint or with other options"):
        converting(one, tmp_path / "out", lambda: None, resume=True)


def test_a_tokenizer_that_is_written_to(runs, tmp_path):
    one, _ = runs(**OCDBT)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0},'
        ' "unk_token": "a"}}'
    )
    with pytest.raises(TensorError, match=r"written to while it was converted \(.*tokenizer.json"):
        converting(
            one,
            tmp_path / "out",
            lambda: (tokenizer / "tokenizer.json").write_text("{}"),
            tokenizer=str(tokenizer),
        )
    assert not (tmp_path / "out").exists()


class Served(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_metadata_at_an_address_that_change(runs, tmp_path):
    """Without OCDBT each array has its own, and chunks of another shape are another array."""
    one, _ = runs(**FILES)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: Served(*a, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        ckpt = f"http://127.0.0.1:{server.server_port}/run/checkpoints/0"
        converting(one, tmp_path / "out", lambda: None, ckpt=ckpt)
        array = one.items / "params.params.token_embedder.embedding" / ".zarray"
        with pytest.raises(TensorError, match=r"written to while it was converted \(http.*zarray"):
            converting(
                one,
                tmp_path / "out",
                lambda: array.write_text(array.read_text().replace(":", ": ")),
                ckpt=ckpt,
            )
    finally:
        server.shutdown()
        server.server_close()
