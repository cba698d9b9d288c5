"""What the tests of push share: the actions on each file, and a byte that changed."""

import json

import cli_runner


def actions(ran: cli_runner.Ran) -> dict[str, str]:
    return {one["name"]: one["action"] for one in json.loads(ran.out)["files"]}


def flip_byte(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
