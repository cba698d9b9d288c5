"""What moeconv 0.1.0 left on people's disks: moeconv.json, of an output and of a run alike."""

import json
from pathlib import Path


def age_output(out: Path) -> None:
    """Gives an output the manifest of moeconv 0.1.0: its name, and version 1 of its content."""
    path = out / "moeconv_manifest.json"
    content = json.loads(path.read_text())
    content["version"] = 1
    del content["kind"], content["source"]["kind"], content["source"]["scan_axis"]
    path.unlink()
    (out / "moeconv.json").write_text(json.dumps(content))


def age_run(run: Path) -> None:
    """Gives a run the sidecar of moeconv 0.1.0."""
    (run / "moeconv_run.json").rename(run / "moeconv.json")
