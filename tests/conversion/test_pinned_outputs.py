"""What converts today converts to the same bytes tomorrow: SHA-256 of every file of many outputs.

`python tests/conversion/test_pinned_outputs.py` writes `tests/fixtures/pinned_outputs.json` anew.
That is right only when an output is meant to change, and then CHANGELOG.md says so.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import synthetic

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion

FIXTURES = Path(__file__).parents[1] / "fixtures"
PINNED = FIXTURES / "pinned_outputs.json"
# One output each: of a fixture, or of a synthetic checkpoint.
CASES: dict[str, dict[str, Any]] = {
    "maxtext-0.1.0-mixtral": {},
    "maxtext-0.1.0-mixtral bfloat16": {"dtype": "bfloat16"},
    "maxtext-0.1.0-llama2-params": {},
    "maxtext-0.1.0-llama2-params untie": {"untie": True, "dtype": "float32"},
    "maxtext-0.2.2-mixtral-tied": {},
    "maxtext-0.2.2-mixtral-tied float16": {"dtype": "float16"},
    **{
        f"{block} {target} {'scanned' if scanned else 'unscanned'} {dtype}": {
            "write": {"block": block, "scanned": scanned, "tied": tied, **more},
            "target": target,
            "dtype": dtype,
        }
        for block, target, scanned, tied, dtype, more in (
            ("mixtral", "mixtral", True, True, "keep", {}),
            ("mixtral", "mixtral", False, False, "bfloat16", {}),
            ("mixtral", "ernie4_5_moe", True, False, "float32", {"dtype": "bfloat16"}),
            ("mixtral", "mixtral", True, True, "float16", {"split": {"D": 2, "M": 3, "E": 4}}),
            ("envy", "mixtral", True, True, "keep", {"sizes": {"M": 40}}),
            ("envy", "ernie4_5_moe", False, True, "keep", {"sizes": {"M": 40}}),
            ("envy", "mixtral", False, False, "bfloat16", {"split": {"D": 2, "H": 2, "h": 2}}),
            ("llama2", "llama", True, True, "keep", {}),
            ("llama2", "llama", False, False, "float16", {"dtype": "bfloat16"}),
        )
    },
}


def digests(case: str, folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a case's output but the manifest, which has this version in it."""
    options = dict(CASES[case])
    write = options.pop("write", None)
    if write is None:
        source = FIXTURES / case.split()[0]
    else:
        source = synthetic.write(folder / "run", seed=11, **write)
        options["config"], source = source.config_file(), source.step_dir
    if write is None:
        options["config"] = source / "config.yml"
    out = folder / "out"
    prepared = plan_conversion(str(source), ConvertOptions(max_shard_bytes=20_000, **options))
    convert(prepared, out)
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.iterdir())
        if file.name != "moeconv_manifest.json"
    }


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_as_ever(case: str, tmp_path: Path) -> None:
    assert digests(case, tmp_path) == json.loads(PINNED.read_text())[case]


if __name__ == "__main__":
    found = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = digests(name, Path(scratch))
    PINNED.write_text(json.dumps(found, indent=1) + "\n")
