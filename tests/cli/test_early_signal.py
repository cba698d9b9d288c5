"""A signal ends a command with 130 and a word from its first moment on, not only while it works."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from cli_runner import environment

from moeconv.cli import start

ENTRY = "import sys; from moeconv.cli.start import main; sys.argv[0] = 'moeconv'; main()"


def begin(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **options,
    )  # fmt: skip


@pytest.fixture
def waiting(tmp_path):
    """A run whose metadata is never answered: the command waits long before there is a plan."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/run", server


def test_before_there_is_a_plan(tmp_path, waiting):
    address, server = waiting
    process = begin("convert", address, tmp_path / "out")
    server.accept()  # so it reads the checkpoint
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_from_the_first_import_on(tmp_path):
    """Stopped at an import of the command line itself; a debugger could not be quicker."""
    script = (
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'moeconv.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"{ENTRY}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_what_the_caller_ignores_stays_ignored():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for given, then in (
            (signal.SIG_IGN, signal.SIG_IGN),  # nohup
            (signal.SIG_DFL, signal.default_int_handler),  # its terminal may close
        ):
            signal.signal(signal.SIGHUP, given)
            start.end_as_ctrl_c()
            assert signal.getsignal(signal.SIGHUP) is then
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
