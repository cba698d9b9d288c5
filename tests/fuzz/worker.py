"""A process that runs `moeconv` again and again for the fuzz tests, and may die of it.

`python worker.py FD SECONDS PACKAGE...` answers calls on a connection, without the packages. It has
no more memory than a command may need, and says where it hangs when it is about to be killed.
"""

import contextlib
import faulthandler
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 3 << 30


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code, None where an exception came out of it.
        out: On stdout.
        err: On stderr; of an exception, its traceback.
        cpu: Seconds of the processor.
        peak: Bytes of memory above what the process had.
        slept: Seconds that it would have waited.
    """

    code: int | None
    out: str
    err: str
    cpu: float
    peak: int
    slept: float


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def command(*args: str) -> Ended:
    """`moeconv ARGS` in this process."""
    import cli_runner

    naps: list[float] = []
    sleep = time.sleep
    time.sleep = lambda seconds: naps.append(seconds) if seconds > 0.3 else sleep(seconds)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, begun = _memory("VmRSS"), time.process_time()
    code: int | None = None
    try:
        ran = cli_runner.moeconv(*args)
        code, out, err = ran.code, ran.out, ran.err
    except BaseException:
        out, err = "", traceback.format_exc()
    finally:
        time.sleep = sleep
    # As a stream would: what is no Unicode becomes `?`.
    out, err = (text.encode("utf-8", "replace").decode() for text in (out, err))
    cpu, peak = time.process_time() - begun, _memory("VmHWM") - before
    return Ended(code, out, err, cpu, peak, sum(naps))


def build(folder: Path) -> None:
    """What the fuzz tests change: runs, outputs, and a conversion that stopped half way."""
    import json

    import outputs
    import synthetic

    from moeconv.conversion.api import ConvertOptions, convert, plan_conversion

    run = outputs.write_run(folder / "run", split={"D": 2})
    tokenizer = run / "tokenizer"
    (tokenizer / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tokenizer / "added_tokens.json").write_text('{"<s>": 0, "</s>": 1}')
    (tokenizer / "tokenizer.model").write_bytes(b"\n\x0b\n\x04abcd\x15\0\0\0\0")
    outputs.convert_run(run, folder / "out", max_shard_bytes=60_000)
    outputs.attest(folder / "out", outputs.parity(1e-6))
    (folder / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nIts own words.\n")
    # Arrays in folders of their own, and a config that the user names.
    for name, zarr3 in (("folders", True), ("older", False)):
        made = synthetic.write(
            folder / name, "mixtral", ocdbt=False, zarr3=zarr3, split={"E": 2}, zeros=zarr3
        )
        (folder / name / "config.yml").write_text(json.dumps(made.config))
    ranks = [f"{encoded} {n}" for n, encoded in enumerate(_letters())]
    (folder / "ranks.tiktoken").write_text("\n".join(ranks) + "\n")

    class Stopped(BaseException):
        pass

    done: list[int] = []

    def stop(read: int, written: int) -> None:
        done.append(written)
        if sum(done) > 90_000:
            raise Stopped

    half = folder / "half"
    half.mkdir()
    with contextlib.suppress(Stopped):
        convert(plan_conversion(str(run), ConvertOptions()), half / "out", progress=stop)
    journal = half / ".out.moeconv-partial" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) > 5, journal.read_text()


def _letters() -> list[str]:
    import base64

    return [base64.b64encode(bytes([n])).decode() for n in range(256)]


def warm() -> None:
    """What takes long to import."""
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401


CALLS: dict[str, Callable[..., Any]] = {"command": command, "build": build, "warm": warm}


def serve(connection: Connection, wall: float, hidden: Sequence[str]) -> None:
    """Answers until the other side goes away."""
    sys.modules.update(dict.fromkeys(hidden))
    limited = False
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        if name == "command" and not limited:
            import moeconv.conversion.api  # noqa: F401

            have = _memory("VmData") + MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (have, have))
            limited = True
        faulthandler.dump_traceback_later(wall if name == "command" else 300, file=sys.__stderr__)
        answer = CALLS[name](*args)
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


if __name__ == "__main__":
    import worker  # under its own name, as the other side knows it

    os.dup2(2, 1)
    worker.serve(Connection(int(sys.argv[1])), float(sys.argv[2]), sys.argv[3:])
