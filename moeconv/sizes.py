"""Byte counts and numbers of parameters, as people write and read them."""

import re

from moeconv.errors import UsageError

# The largest file that the Hub takes (huggingface.co/docs/hub/storage-limits).
HUB_FILE_LIMIT = 50 * 10**9

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*\Z")


def parse_size(text: str) -> int:
    """Bytes of `5GB` (10^9), `4GiB` (2^30) or a plain number.

    Raises:
        UsageError: It is none of these, or zero.
    """
    match = _SIZE.match(text)
    if not match or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is not a size such as 5GB, 512MiB or 4GiB")
    number = float(match[1]) * _UNITS[match[2].lower()]
    if number > 2**63:
        raise UsageError(f"{text!r} is not a size that a file can have")
    size = int(number)
    if size < 1:
        raise UsageError(f"{text!r} is not a size above zero")
    return size


def parse_file_size(text: str) -> int:
    """As `parse_size`, for the largest file of a model, which the Hub has to take.

    Raises:
        UsageError: It is no size, or more than the Hub takes.
    """
    size = parse_size(text)
    if size > HUB_FILE_LIMIT:
        raise UsageError(
            f"{text!r} is too large for a file: the Hub takes up to {format_size(HUB_FILE_LIMIT)} "
            "as one; give that or less"
        )
    return size


def format_size(count: float) -> str:
    """`1.21 GB`, `512 kB`, in powers of ten, as file listings show them."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def format_count(count: int) -> str:
    """`304M`, `22.9k`: how many parameters, as models are named."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
