"""Going on with an interrupted conversion: the same one, or none."""

import os
import shutil
import signal

import pytest
import synthetic
from cli_runner import moeconv
from engine_lab import contents, interrupted, partial, to

from moeconv.errors import OutputError


def test_a_journal_with_a_cut_line(big, expected, tmp_path):
    out = tmp_path / "out"
    interrupted(big, out, "middle", signal.SIGKILL)
    journal = partial(out) / "journal.jsonl"
    for cut in (7, 3000):
        os.truncate(journal, journal.stat().st_size - cut)
    left = journal.read_text().count("\n") - 1
    manifest = to(big, out, resume=True)
    assert left > 10
    assert set(manifest.files) == set(expected) - {"moeconv_manifest.json"}
    assert contents(out) == expected


def test_a_staged_file_that_is_gone(tiny, crashes, tmp_path):
    """The journal says what was written; where the file itself is not there, it is not believed."""
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    (partial(out) / "model.safetensors").unlink()
    with pytest.raises(OutputError, match="is gone or cut; begin anew without --resume"):
        to(tiny, out, resume=True)
    to(tiny, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags",
    [("--dtype", "bfloat16"), ("--untie",), ("--max-shard-size", "30kB"), ("--allow-nonfinite",),
     ("--set", "rope_max_timescale=1e4"), ("--target", "ernie4_5_moe")],
)  # fmt: skip
def test_resuming_with_other_options(tiny, crashes, tmp_path, flags):
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    before = contents(partial(out))
    config = ("--config", tiny.run / "config.yml")
    ran = moeconv("convert", tiny.run, out, *config, *flags, "--resume")
    assert ran.code == OutputError.exit_code
    assert "of another checkpoint or with other options" in ran.error
    assert "leave out --resume to begin anew" in ran.error
    assert contents(partial(out)) == before, "what was done is not lost by the mistake"
    assert moeconv("convert", tiny.run, out, *config, "--resume").code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_resuming_another_checkpoint(tiny, crashes, tmp_path):
    out = tmp_path / "out"
    crashes.leave_unfinished(tiny, out)
    other = synthetic.write(tmp_path / "other", "envy", seed=1)
    other.config_file()
    with pytest.raises(OutputError, match="of another checkpoint"):
        to(other, out, resume=True)


@pytest.mark.parametrize("same_place", [True, False])
def test_resuming_another_checkpoint_of_the_same_shapes(crashes, tmp_path, same_place):
    """Without OCDBT no metadata speak of the chunks, so all that is written about both is equal."""
    storage = {"ocdbt": False, "zarr3": False}
    one = synthetic.write(tmp_path / "one", "envy", **storage)
    other = synthetic.write(tmp_path / "other", "envy", seed=1, **storage)
    one.config_file()
    out = tmp_path / "out"
    crashes.leave_unfinished(one, out)
    if same_place:
        shutil.rmtree(one.run)
        other.run.rename(one.run)
        other = one
    other.config_file()
    with pytest.raises(OutputError, match="of another checkpoint"):
        to(other, out, resume=True)


def test_resuming_a_checkpoint_without_ocdbt(crashes, tmp_path):
    checkpoint = synthetic.write(tmp_path / "run", "envy", ocdbt=False, zarr3=False)
    checkpoint.config_file()
    out = tmp_path / "out"
    crashes.leave_unfinished(checkpoint, out)
    to(checkpoint, out, resume=True)
    to(checkpoint, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_missing_chunks_are_told_when_resumed(crashes, tmp_path):
    """Of an older Orbax, which stores no zeros, so that a lost one reads the same."""

    def change(arrays):
        arrays["token_embedder.embedding"][:] = 0

    checkpoint = synthetic.write(tmp_path / "run", "envy", change=change, zeros=False)
    checkpoint.config_file()
    out = tmp_path / "out"
    crashes.leave_unfinished(checkpoint, out, "--allow-missing-chunks")
    with pytest.raises(OutputError, match="with other options"):
        to(checkpoint, out, resume=True)
    manifest = to(checkpoint, out, resume=True, allow_missing_chunks=True)
    assert manifest.missing_chunks == {"token_embedder.embedding": [[0, 0]]}
    assert any("token_embedder.embedding" in text for text in manifest.warnings)


def test_beginning_anew_over_an_unfinished_conversion(tiny, crashes, tmp_path):
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    (partial(out) / "stray").write_text("of an earlier version")
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml")
    assert ran.code == 0
    assert "an unfinished conversion to this OUT was found and begun anew" in ran.err
    assert contents(out) == contents(tmp_path / "whole")


def test_nothing_to_resume(tiny, tmp_path):
    ran = moeconv(
        "convert", tiny.run, tmp_path / "out", "--config", tiny.run / "config.yml", "--resume"
    )
    assert ran.code == 0
    assert "there is no unfinished conversion to resume; starting from the first byte" in ran.err


def test_files_of_an_interrupted_process_are_not_published(tiny, crashes, tmp_path):
    """Killed among the small files with one tokenizer, resumed without: none of it stays."""
    out = tmp_path / "out"
    crashes.convert(tiny, tmp_path / "whole")
    crashes.leave_unfinished(tiny, out)
    (partial(out) / "tokenizer.json").write_text("{}")
    to(tiny, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
