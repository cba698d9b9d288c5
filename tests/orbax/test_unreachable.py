"""A store that cannot be reached or says nothing is told of within seconds, by its name."""

import http.server
import socket
import threading
import time

import pytest
import synthetic
from cli_runner import moeconv, run
from file_server import Files

from moeconv.errors import NotACheckpointError, StorageError
from moeconv.orbax.locate import locate
from moeconv.orbax.store import Folder

# Read once in a process, so the mute server is met by processes of their own.
IMPATIENT = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "1",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("moeconv.orbax.store._FIRST_DELAYS", (0.01, 0.01))


@pytest.fixture
def closed():
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def mute():
    """The address of a server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def serve(tmp_path):
    """Serves the folder; `before(n)` may answer request n with a status of its own."""
    servers = []

    def start(before=lambda number: None):
        asked = []

        def answer(self):
            asked.append(self.path)
            status = before(len(asked))
            return Files.do_GET(self) if status is None else self.send_error(status)

        handler = type("Served", (Files,), {"root": tmp_path, "do_GET": answer})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_nobody_listens(closed):
    begun = time.monotonic()
    ran = moeconv("inspect", f"{closed}/run")
    assert time.monotonic() - begun < 5
    assert ran.code == StorageError.exit_code
    assert ran.err.startswith(f"reading {closed}/run\n")  # before it is tried
    assert "Could not connect to server" in ran.error and f"{closed}/run" in ran.error


def test_a_server_that_says_nothing_is_left(mute):
    begun = time.monotonic()
    ran = run("inspect", f"{mute}/run", **IMPATIENT)
    assert time.monotonic() - begun < 10
    assert ran.code == StorageError.exit_code
    assert "Timeout was reached" in ran.error and f"{mute}/run" in ran.error


def test_no_log_line_of_an_sdk_is_seen(closed):
    """AWS's says ten, tensorstore's Google one, about credentials that are not there."""
    endpoint = {"AWS_ENDPOINT_URL": closed, "TENSORSTORE_GCS_HTTP_URL": closed}
    for address in ("s3://no-such-bucket-of-ours/x", "gs://no-such-bucket-of-ours/x"):
        ran = run("inspect", address, **IMPATIENT, **endpoint, AWS_EC2_METADATA_DISABLED="true")
        assert ran.code == StorageError.exit_code
        assert len(ran.err.splitlines()) == 2, ran.err
        assert ran.err.startswith(f"reading {address}\nerror: cannot read {address}/_METADATA: ")


@pytest.mark.parametrize("status", [503, 429])
def test_a_failure_that_passes_is_asked_again(tmp_path, serve, status):
    made = synthetic.write(tmp_path / "run")
    address, asked = serve(lambda number: status if number == 1 else None)
    place = f"{address}/{made.step_dir.relative_to(tmp_path)}"
    assert locate(place).number == 0
    assert asked[0] == asked[1]


def test_a_failure_that_stays_is_asked_a_few_times(tmp_path, serve):
    address, asked = serve(lambda number: 503)
    with pytest.raises(StorageError, match=r"/run/_METADATA: Service Unavailable \[HTTP code 503"):
        locate(f"{address}/run")
    assert len(asked) == 3


def test_what_is_denied_beside_a_step_is_absent(tmp_path, serve):
    """S3 denies what is not there to whoever may not list."""
    made = synthetic.write(tmp_path / "run")
    address, asked = serve(lambda number: 403 if asked[-1].endswith("moeconv_run.json") else None)
    config = made.config_file(tmp_path)
    place = f"{address}/{made.step_dir.relative_to(tmp_path)}"
    assert moeconv("inspect", place, "--config", config).code == 0
    assert any(path.endswith("moeconv_run.json") for path in asked)


def test_what_fails_beside_a_step_is_no_absence(tmp_path, serve):
    made = synthetic.write(tmp_path / "run")
    address, asked = serve(lambda number: 500 if asked[-1].endswith("moeconv_run.json") else None)
    place = f"{address}/{made.step_dir.relative_to(tmp_path)}"
    ran = moeconv("inspect", place)
    assert ran.code == StorageError.exit_code
    assert "moeconv_run.json: Internal Server Error" in ran.error


@pytest.mark.parametrize("address", ["ftp://host/run", "gcs://bucket/run", "hf:user/model"])
def test_an_address_of_another_kind(address):
    with pytest.raises(NotACheckpointError, match=r"cannot read; it reads .*gs://"):
        Folder.open(address)
