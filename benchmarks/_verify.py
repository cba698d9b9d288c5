"""One level of `moeconv verify`, measured within its process: what comes after the imports.

python _verify.py LEVEL OUT SOURCE CONFIG TOKENS SCRATCH   prints JSON

Memory is this process's high-water mark after the imports, which are most of a gigabyte, less what
it held before: `rss` all of it, the kernel's own figure; `anonymous` without pages of mapped files,
which the kernel may drop at any time, sampled.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path


def main(level: str, out: str, source: str, config: str, tokens: str, scratch: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    from moeconv.verification.run import verify
    from moeconv.verification.settings import ParityOptions, VerifyOptions

    if level in ("logits", "layers"):
        import jax
        import torch
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
        from maxtext.configs import pyconfig  # noqa: F401
        from maxtext.utils import model_creation_utils  # noqa: F401

        jax.devices()
        torch.zeros(1)
    parity = ParityOptions(tokens=int(tokens), config=Path(config), scratch=Path(scratch))
    options = VerifyOptions(levels=[level], jobs=os.cpu_count() or 1, parity=parity)  # type: ignore[list-item]
    before = _status()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    peak, done = before["RssAnon"], threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _status()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    notes = []

    def note(text: str) -> None:
        notes.append([round(time.perf_counter() - begin, 1), _status()["RssAnon"] >> 20, text])

    report = verify(Path(out), source=source, options=options, note=note)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    print(
        json.dumps(
            {
                "verdict": report.verdict.value,
                "checks": {c.name: c.summary for c in report.checks},
                "seconds": seconds,
                "rss": _status()["VmHWM"] - before["VmRSS"],
                "anonymous": peak - before["RssAnon"],
                "imports": before["VmRSS"],
                "notes": notes,
            }
        )
    )


def _status() -> dict[str, int]:
    """Bytes by name, of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in lines if len(w) == 3 and w[2] == "kB"}


if __name__ == "__main__":
    main(*sys.argv[1:])
