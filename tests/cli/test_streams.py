"""The same checkpoint by any name, and clean streams whoever reads them."""

import json
import shlex
import struct
import subprocess
from pathlib import Path

import cli_runner
import pytest
from cli_runner import Ran, moeconv
from refusals import CLICK_USAGE, convert, out_of

from moeconv.errors import NotACheckpointError, OutputError


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_ckpt_named_in_every_way(checkpoint, monkeypatch):
    config = checkpoint.config_file(checkpoint.run.parent)
    run, step = checkpoint.run, checkpoint.step_dir
    monkeypatch.chdir(run)
    ways = [run, run / "checkpoints", step, step / "items", f"{run}/", f"file://{run}",
            f"file://{step}/items/", ".", "checkpoints/../checkpoints/0"]  # fmt: skip
    written = []
    for n, way in enumerate(ways):
        out = run.parent / f"out{n}"
        ran = moeconv("convert", way, out, "--config", config)
        assert ran.code == 0, ran.err
        written.append(listing(out))
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize(
    "name", ["with space", "a#b", "a?b", "50%", "%41", "a|b:c", "ünï", "a'b\"c", "a&b=c;d", "[x]*"]
)
@pytest.mark.parametrize("ocdbt", [True, False])
def test_paths_with_odd_characters(made, tmp_path, name, ocdbt):
    folder = tmp_path / name
    folder.mkdir()
    checkpoint = made(folder, ocdbt=ocdbt)
    ran = convert(checkpoint)
    assert ran.code == 0, ran.err
    assert (out_of(checkpoint) / "model.safetensors").exists()


def test_a_file_url_with_escapes(made, tmp_path):
    folder = tmp_path / "with space%"
    folder.mkdir()
    checkpoint = made(folder)
    config = checkpoint.config_file()
    url = checkpoint.run.as_uri()
    assert "%20" in url
    ran = moeconv("convert", url, tmp_path / "out", "--config", config)
    assert ran.code == 0, ran.err
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint), "--config", config)
    assert ran.code == 0, ran.err
    assert listing(tmp_path / "out") == listing(out_of(checkpoint))


def test_json_alone_on_stdout(checkpoint):
    config = checkpoint.config_file(checkpoint.run.parent)
    out = out_of(checkpoint)
    for args in (
        ["inspect", checkpoint.run],
        ["inspect", checkpoint.run, "--config", config],
        ["convert", checkpoint.run, out, "--config", config, "--dry-run"],
        ["convert", checkpoint.run, out, "--config", config],
    ):
        ran = moeconv(*args, "--json")
        assert ran.code == 0, ran.err
        assert isinstance(json.loads(ran.out), dict)
        if "--dry-run" in args:
            assert not out.exists()
    assert json.loads(ran.out)["files"].keys() == listing(out).keys() - {"moeconv_manifest.json"}
    ran = moeconv("convert", checkpoint.run, out, "--config", config, "--json")
    assert ran.code == OutputError.exit_code
    assert ran.out == ""


def test_dry_run_says_what_convert_does(checkpoint):
    plan = json.loads(convert(checkpoint, "--dry-run", "--json").out)
    assert convert(checkpoint).code == 0
    out = out_of(checkpoint)
    assert {f["name"]: f["bytes"] for f in plan["files"]} == {
        "model.safetensors": (out / "model.safetensors").stat().st_size
    }
    raw = (out / "model.safetensors").read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    assert {t["name"] for t in plan["tensors"]} == set(header)
    for tensor in plan["tensors"]:
        start, stop = header[tensor["name"]]["data_offsets"]
        assert tensor["offset"] == 8 + length + start
        assert tensor["bytes"] == stop - start
        assert tensor["shape"] == header[tensor["name"]]["shape"]


def test_quiet_says_nothing_but_warnings(checkpoint):
    ran = convert(checkpoint, "--quiet")
    assert (ran.code, ran.out, ran.said) == (0, "", [])


def test_a_terminal_that_knows_few_letters(checkpoint):
    config = checkpoint.config_file(checkpoint.run.parent)
    for encoding, args in (
        ("ascii", ["inspect", checkpoint.run]),
        ("ascii", ["convert", checkpoint.run, out_of(checkpoint), "--dry-run"]),
        ("latin-1", ["inspect", checkpoint.run, "--json"]),
    ):
        ran = cli_runner.run(*args, "--config", config, PYTHONIOENCODING=encoding)
        assert ran.code == 0, ran.err
        if "--json" in args:
            assert json.loads(ran.out)["kind"] == "parameters only"


def piped(redirect: str, *args: object) -> Ran:
    """`moeconv ARGS REDIRECT` in a shell, which gives the command's own exit code."""
    words = shlex.join(cli_runner.command(*args))
    ran = subprocess.run(
        ["bash", "-c", f"{words} {redirect}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, env=cli_runner.environment(), timeout=300,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr, ran.stderr
    return Ran(ran.returncode, ran.stdout, ran.stderr)


# A process takes half a second, so not every command meets every way.
def test_a_reader_that_goes_away(checkpoint):
    """The work is whole, and its code is its own."""
    config = ("--config", checkpoint.config_file(checkpoint.run.parent))
    out = out_of(checkpoint)
    assert piped("| head -1", "inspect", checkpoint.run, *config, "--json").code == 0
    for number, redirect in enumerate(("2>&1 | true", "2>&-")):
        made = out.with_name(f"out{number}")
        assert piped(redirect, "convert", checkpoint.run, made, *config).code == 0
        assert (made / "moeconv_manifest.json").exists()
        assert piped(redirect, "convert", "nope", out).code == NotACheckpointError.exit_code
    assert piped("2>&1 | true", "convert").code == CLICK_USAGE


FULL = (">/dev/full", "No space left on device")
CLOSED = (">&-", "it is closed")


def test_an_answer_that_cannot_be_written(checkpoint):
    config = ("--config", checkpoint.config_file(checkpoint.run.parent))
    out = out_of(checkpoint)
    sentence = "error: the answer cannot be written to stdout ({}); all else is done\n"
    for (redirect, why), args in (
        (FULL, ["inspect", checkpoint.run, *config]),
        (FULL, ["--help"]),
        (CLOSED, ["inspect", checkpoint.run, *config]),
        (CLOSED, ["convert", checkpoint.run, out, *config]),
    ):
        ran = piped(redirect, *args)
        assert ran.code == CLICK_USAGE
        assert ran.err.endswith(sentence.format(why))
    assert (out / "moeconv_manifest.json").exists()
    for redirect, _ in (FULL, CLOSED):
        ran = piped(redirect, "convert", "nope", out)
        assert ran.code == NotACheckpointError.exit_code
        assert "cannot be written" not in ran.err, "there was no answer"
    ran = piped(">&- 2>&-", "convert", "nope", out)
    assert (ran.code, ran.err) == (NotACheckpointError.exit_code, "")


@pytest.mark.slow
def test_a_verdict_that_cannot_be_written(checkpoint):
    config = checkpoint.config_file(checkpoint.run.parent)
    out = out_of(checkpoint)
    assert moeconv("convert", checkpoint.run, out, "--config", config).code == 0
    ran = piped(">&-", "verify", out, "--level", "structure")
    assert ran.code == 2, "never 1, which is a verdict"
