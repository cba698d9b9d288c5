"""An HTTP server of files, as an address that tensorstore reads."""

import http.server
import re
from pathlib import Path


class Files(http.server.SimpleHTTPRequestHandler):
    """Files below `root`; byte ranges are honoured unless `ranges` is False."""

    root: Path
    ranges = True
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, size = path.read_bytes(), path.stat().st_size
        asked = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and self.ranges:
            start = int(asked[1]) if asked[1] else size - int(asked[2])
            stop = int(asked[2]) + 1 if asked[1] and asked[2] else size
            data = data[start:stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass
