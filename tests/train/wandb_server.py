"""Weights & Biases on loopback, as far as `wandb sync` needs it: what it keeps of each run."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Keeps the history that clients stream, by the run's id."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def query(self, name, variables):
        run = {"id": "r", "name": variables.get("name"), "displayName": "n"}
        run["project"] = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        if name == "RunResumeStatus":
            lines = self.runs.get(run["name"])
            bucket = None if lines is None else run | status(lines)
            return {"model": {"name": "p", "entity": {"name": "e"}, "bucket": bucket}}
        if name == "UpsertBucket":
            new = run["name"] not in self.runs
            self.runs.setdefault(run["name"], [])
            return {"upsertBucket": {"bucket": run, "inserted": new}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        return {}

    def stream(self, run, files):
        if history := files.get("wandb-history.jsonl"):
            # In place of the lines that are there.
            self.runs[run][history["offset"] :] = map(json.loads, history["content"])


def status(lines):
    """Of a run that is there: how much of it, and the last of that."""
    tail = json.dumps([json.dumps(lines[-1])] if lines else [])
    return {
        "historyLineCount": len(lines),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": tail,
        "eventsTail": "[]",
        "config": "{}",
        "summaryMetrics": "{}",
        "wandbConfig": '{"t": 1}',  # it has begun
        "tags": [],
    }


class Handler(BaseHTTPRequestHandler):
    """GraphQL, and a run's stream of files."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            raw = gzip.decompress(raw)
        if self.path != "/graphql" and not self.path.endswith("/file_stream"):
            self.answer({})  # telemetry
            return
        content = json.loads(raw)
        if found := re.fullmatch(r"/files/\w+/\w+/(\w+)/file_stream", self.path):
            self.server.stream(found[1], content.get("files") or {})
            self.answer({})
            return
        name = re.search(r"(?:query|mutation)\s+(\w+)", content.get("query", ""))
        data = self.server.query(name[1] if name else "", content.get("variables") or {})
        self.answer({"data": data})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
