"""Control characters of files, servers and names never act on a terminal."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import synthetic
from cli_runner import environment, moeconv
from rich.table import Table
from rich.text import Text

from moeconv.cli.output import Output
from moeconv.errors import ConfigError

# Clear the screen, set the title, a C1 introducer, turn the direction of writing, overwrite a line.
HARM = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\rerror: no\x08"
ESCAPED = r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\x0derror: no\x08"


class Terminal(io.StringIO):
    """What a terminal is asked to do."""

    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """What an Output shows on a terminal with colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def show(act):
        screen = Terminal()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            act(Output())
        return screen.getvalue()

    return show


def test_lines(shown):
    assert shown(lambda output: output.note(HARM)) == f"{ESCAPED}\n"
    assert shown(lambda output: output.warn(HARM)) == f"warning: {ESCAPED}\n"
    assert shown(lambda output: output.print(HARM)) == f"{ESCAPED}\n"


def test_several_lines_stay_several(shown):
    assert shown(lambda output: output.note("one:\n\ttwo\nthree")) == "one:\n\ttwo\nthree\n"


def work(output):
    with output.working() as note:
        note(f"one {HARM}")
        note("warning: two")
        with output.progress(100, 0) as meter:
            meter(100, 0)
        note("three")


def test_a_spinner_shows_what_is_done_and_leaves_how_long_it_took(shown):
    text = shown(work)
    left = [line.rpartition("\x1b[2K")[2] for line in text.splitlines()]
    assert [line for line in left if line.endswith(" s)")] == [
        f"one {ESCAPED} (0 s)",
        "three (0 s)",
    ]
    assert "warning: two" in left
    assert f" one {ESCAPED[:20]}" in text  # beside what turns
    assert "\x1b]0;" not in text and "\u202e" not in text


def test_without_a_terminal_nothing_turns(capsys):
    work(Output())
    one, two, read, three = capsys.readouterr().err.splitlines()
    assert [one, two, three] == [f"one {ESCAPED}", "warning: two", "three"]
    assert read.startswith("read 100 B of 100 B")


def test_quiet_work_only_warns(capsys):
    work(Output(quiet=True))
    assert capsys.readouterr().err == "warning: two\n"


def test_tables_keep_their_own_colours(shown):
    table = Table(title=HARM)
    table.add_column(f"a{HARM}")
    table.add_column("b")
    table.add_row(Text("pass", style="green"), HARM)
    screen = shown(lambda output: output.print(table))
    assert "\x1b[32mpass" in screen
    assert "\x1b[2J" not in screen and "\x1b]0" not in screen
    assert not set("\x07\x08\r\x9b\u202e") & set(screen)
    assert r"\x1b[2J" in screen


def test_json_has_no_character_to_act_on(capsys):
    Output(json_mode=True).data({"name": HARM, "é": 1})
    text = capsys.readouterr().out
    assert text.isascii() and not {c for c in text if c < " "} - {"\n"}
    assert json.loads(text) == {"name": HARM, "é": 1}


@pytest.mark.parametrize("content", [float("nan"), {"a": [float("inf")]}, "\ud800", {"\udfff": 1}])
def test_what_json_cannot_hold_is_no_answer(capsys, content):
    with pytest.raises(ConfigError, match="cannot be given as JSON"):
        Output(json_mode=True).data(content)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        (HARM,),
        ("inspect", HARM),
        ("inspect", "run", "--set", HARM),
        ("inspect", "run", "--set", f"rope_type={HARM}"),
        ("inspect", "run", f"--{HARM}"),
        ("convert", "run", "out", "--target", HARM),
        ("convert", "run", f"gs://{HARM}"),
        ("convert", "run", "out", "--max-memory", HARM),
        ("verify", HARM),
        ("verify", "out", "--level", HARM),
    ],
    ids=range(10),
)
def test_a_failure_says_what_was_typed_as_text(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "run")
    ran = moeconv(*arguments)
    assert ran.code != 0
    assert not {c for c in ran.err if c < " "} - {"\n", "\t"}
    assert not set("\x9b\u202e\x7f") & set(ran.err)
    assert r"\u202eevil" in ran.err  # click itself drops what it knows for colours


def test_names_in_a_checkpoint_are_text(tmp_path):
    """Of a parameter, of the run's folder, and of what its sidecar says."""
    made = synthetic.write(tmp_path / "run\x1b[2J")
    sidecar = {"format": "moeconv-run", "version": 1, "tokenizer": "t\x1b]0;x\x07",
               "config": {**made.config, "quantization": "int8\x1b[31m"}}  # fmt: skip
    (made.run / "moeconv_run.json").write_text(json.dumps(sidecar))
    inspected = moeconv("inspect", made.run)
    assert r"quantization=int8\x1b[31m computes" in inspected.err
    converted = moeconv("convert", made.run, tmp_path / "out")
    assert r"run\x1b[2J/t\x1b]0;x\x07" in converted.error
    for said in (inspected.out, inspected.err, converted.err):
        assert not {"\x1b", "\x07"} & set(said)


@pytest.mark.parametrize("place", ["inspect", "convert", "verify", "config"])
def test_a_path_that_is_no_text_is_a_sentence(tmp_path, place):
    """It could be written into no manifest; the command says so before it works."""
    made = synthetic.write(tmp_path / "run")
    odd = os.fsdecode(b"odd\xff")
    arguments = {
        "inspect": ["inspect", tmp_path / odd],
        "convert": ["convert", made.run, tmp_path / odd, "--config", made.config_file()],
        "verify": ["verify", tmp_path / odd],
        "config": ["inspect", made.run, "--config", tmp_path / odd],
    }[place]
    (tmp_path / odd).mkdir()
    ran = moeconv(*arguments)
    assert ran.code in (2, 3), ran.err
    assert "UTF-8" in ran.err and "Traceback" not in ran.err


def test_native_log_lines_are_dropped_and_all_else_is_seen(tmp_path):
    """In a process of its own: it is descriptor 2 that is filtered."""
    script = tmp_path / "write.py"
    script.write_text(
        "import os, sys, time\n"
        "from moeconv.cli import streams\n"
        "from moeconv.untrusted import native_logs\n"
        "streams.guard()\n"
        "os.write(2, b'before\\n')\n"
        "native_logs.filter_stderr()\n"
        "os.write(2, b'E1126 00:44:00.762474   13531 common-io:5] no credentials\\n')\n"
        "os.write(2, b'terminate called\\n')\n"
        "os.write(2, b'F1126 00:44:00.762474 fatal\\n')\n"
        "time.sleep(0.3)\n"
        "print('ours', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment(), check=True
    )
    wanted = ["before", "terminate called", "F1126 00:44:00.762474 fatal", "ours"]
    assert done.stderr.splitlines() == wanted
