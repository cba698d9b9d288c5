"""Checkpoints at an address."""

import http.server
import threading

import pytest
from file_server import Files


@pytest.fixture
def address(tmp_path):
    """An HTTP address of everything below `tmp_path`."""
    handler = type("Served", (Files,), {"root": tmp_path})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
