"""`moeconv verify`: a bound verdict or one sentence, whatever happens meanwhile."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cli_runner
import orbax_writer
import pytest
from click.testing import CliRunner
from outputs_lab import admit, edit, scale

from moeconv.cli.verify import command
from moeconv.errors import OutputError
from moeconv.verification.run import verify
from moeconv.verification.settings import VerifyOptions


def test_a_verdict_is_of_the_bytes_that_were_seen(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)

    def somebody(text: str) -> None:
        if text == "level weights":
            edit(out, rms_norm_eps=1e-6)
            admit(out, "config.json")

    options = VerifyOptions(levels=("structure", "weights"))
    with pytest.raises(OutputError, match=r"changed while it was verified \(.*config.json"):
        verify(out, source=None, options=options, note=somebody)


def test_a_report_that_cannot_be_written_is_known_before_the_work(right, tmp_path):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "report")
    result = CliRunner().invoke(command, [str(right), "--report", place])
    assert result.exit_code == 2
    assert "give another folder with --report" in result.output and "level" not in result.output


def test_a_checkpoint_that_is_gone_is_asked_for(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    manifest["source"]["path"] = str(tmp_path / "gone")
    (out / "moeconv_manifest.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert result.exit_code == 2
    assert "--source gives another, and level structure needs none" in result.output
    quiet = CliRunner().invoke(command, [str(out), "--level", "structure", "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_the_command_writes_a_bound_verdict(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    result = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "verify.json").read_text())
    assert report["verdict"] == "pass", result.output
    assert report["levels"] == {"weights": "pass"}
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    assert report["source"] == manifest["source"]["digest"]
    for name, record in manifest["files"].items():
        assert report["files"][name] == record["sha256"]
    assert "moeconv_manifest.json" in report["files"]


def test_a_level_alone_proves_little_and_keeps_what_is_known(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    alone = CliRunner().invoke(command, [str(out), "--level", "structure"])
    assert "PASS: nothing is wrong at level structure; that it is the model" in alone.output
    both = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert "kept in the report, of the same bytes: structure pass" in both.output
    report = json.loads((out / "verify.json").read_text())
    assert report["levels"] == {"structure": "pass", "weights": "pass"}
    edit(out, rms_norm_eps=1e-6)
    other = CliRunner().invoke(command, [str(out), "--level", "weights"])
    assert "kept" not in other.output, "those are other bytes"
    assert json.loads((out / "verify.json").read_text())["levels"] == {"weights": "pass"}


def test_a_bug_is_no_verdict(right, monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise AttributeError("of ours")

    monkeypatch.setattr("moeconv.verification.levels.structure.run_level", fails)
    options = [str(right), "--level", "structure", "--report", str(tmp_path / "report")]
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 2
    assert "Traceback" in result.output and "AttributeError: of ours" in result.output
    assert "error: no verdict" in result.output
    assert not (tmp_path / "report").exists()


def test_a_verdict_that_nobody_reads_is_one(right, tmp_path):
    """`moeconv verify OUT | head -1`, of one that passes."""
    for args in ((), ("--json",)):
        process = cli_runner.spawn(
            "verify", right, "--level", "weights", "--report", tmp_path, *args
        )
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(60) == 0
        assert (tmp_path / "verify.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_alike(right, tmp_path, number):
    """Interrupted while it works, it ends with 130 and leaves nothing."""
    code = (
        "import os, sys, tempfile, time\n"
        "from moeconv.verification.levels import structure\n"
        "def waits(run):\n"
        "    with tempfile.TemporaryDirectory(prefix='moeconv-verify-'):\n"
        "        os.write(1, b'working\\n')\n"
        "        time.sleep(60)\n"
        "structure.run_level = waits\n"
        "from moeconv.cli.main import main\n"
        f"sys.argv = ['moeconv', 'verify', {str(right)!r}, '--level', 'structure', '-q',\n"
        f"            '--report', {str(tmp_path / 'report')!r}]\n"
        "main()\n"
    )
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli_runner.environment(TMPDIR=str(tmp_path / "tmp")),
    )
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err.strip()) == ("", "interrupted")
    assert process.returncode == 130
    assert list((tmp_path / "tmp").iterdir()) == []


def test_memory_that_cannot_suffice_is_refused(right, tmp_path):
    options = [str(right), "--level", "weights", "--report", str(tmp_path), "--max-memory"]
    result = CliRunner().invoke(command, [*options, "1KB"])
    assert result.exit_code == 2
    said = re.search(r"--max-memory 1 kB is below the .* give --max-memory (\d+MiB)", result.output)
    assert said, result.output
    assert CliRunner().invoke(command, [*options, said[1]]).exit_code == 0


def test_the_command_fails_with_one(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    scale(out, "model.norm.weight", 2)
    result = CliRunner().invoke(command, [str(out), "--level", "weights", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["verdict"] == "fail"
    assert report["checks"][-1]["tensors"] == ["model.norm.weight"]


def test_another_checkpoint_is_told_apart(right, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(right.parent / "run", run)
    out = tmp_path / "out"
    shutil.copytree(right, out)
    other = {p: a + 1 for p, a in _arrays(run).items()}
    shutil.rmtree(run)
    step = orbax_writer.write(run / "checkpoints" / "9", other)
    result = CliRunner().invoke(command, [str(out), "--source", str(step), "--level", "weights"])
    assert result.exit_code == 1
    assert "are not those that were converted" in result.output


def _arrays(run: Path):
    from moeconv.maxtext.checkpoint import open_checkpoint

    opened = open_checkpoint(str(run), sets=("decoder_block=envy",))
    found = {}
    for info in opened.arrays.info.values():
        reader = opened.arrays.reader(info.name, 1 << 20)
        found[info.path] = reader.read(tuple(slice(0, n) for n in info.shape)).copy()
    return found
