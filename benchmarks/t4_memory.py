"""What each setting costs in memory and matmuls on 2xT4: MaxText's steps, compiled for them.

No GPU is needed, but the CUDA plugin of JAX; see docs/memory.md. XLA's own numbers.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import _hlo
from _measure import table

from moeconv.errors import MissingPackageError

if TYPE_CHECKING:
    from moeconv_train.preflight.report import MemoryRow

# Settings over the recipe.
CONFIGURATIONS: tuple[dict[str, object], ...] = (
    {},
    {"remat_policy": "minimal_with_context"},
    {"num_vocab_tiling": 4},
    {"remat_policy": "save_dot_except_mlpwi"},
    {"remat_policy": "full"},
    {"remat_policy": "full", "num_vocab_tiling": 4},
    {"remat_policy": "full", "scan_layers": True},
    {"per_device_batch_size": 2, "gradient_accumulation_steps": 2},
    {"dtype": "bfloat16"},
    {"dtype": "float32"},
)

_SIZES = ("configuration", "state", "train step", "evaluation", "total", "usable", "fits")
HEADINGS = (*_SIZES, "TFLOP", "GB moved", "MB all-reduced")


def sizes_of(row: "MemoryRow") -> tuple[str, ...]:
    """XLA's part of a line: GiB, and whether it fits."""
    sizes = (row.arguments, row.train, row.evaluation, row.total, row.usable)
    fits = ("yes" if row.fits else "no") + " (XLA remat)" * row.xla_rematerialised
    return (row.name, *(f"{size / 2**30:.2f}" for size in sizes), fits)


def main() -> None:
    """Prints the table."""
    from moeconv_train.preflight.config import name_of
    from moeconv_train.preflight.memory import Variant, measure
    from moeconv_train.preflight.target import T4X2
    from moeconv_train.recipe import read, read_config

    parser = argparse.ArgumentParser(description=__doc__)
    recipes = Path(__file__).resolve().parents[1] / "train" / "configs"
    default = recipes / "llama3_moe_200m_tinystories.yml"
    parser.add_argument("recipe", nargs="?", type=Path, default=default)
    parser.add_argument("--stock", action="store_true", help="without the trainer's patches")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args()

    recipe, begun = read_config(args.recipe), time.perf_counter()
    patches = None if args.stock else dict(read([str(args.recipe)]).run.patches)
    # What the recipe says itself need not be compiled again.
    configurations = [
        Variant(name_of(changes) or "the recipe", changes, patches)
        for changes in CONFIGURATIONS
        if not changes or {**recipe, **changes} != recipe
    ]
    with tempfile.TemporaryDirectory() as texts:
        try:
            rows, failed = measure(recipe, T4X2, configurations, hlo=Path(texts))
        except MissingPackageError as error:
            sys.exit(f"{error}")
        written = {row.name: Path(texts, f"{row.name}.hlo").read_text() for row in rows}
    counted = {name: _hlo.count(text) for name, text in written.items()}
    sent = {name: _hlo.sent(text) for name, text in written.items()}
    how = "stock MaxText" if args.stock else f"with its patches {patches}"
    print(f"{args.recipe.name} on {T4X2.name}, {how}; GiB a device")
    cells = [
        (
            *sizes_of(row),
            f"{sum(counted[row.name].flops.values()) / 1e12:.2f}",
            f"{counted[row.name].traffic / 1e9:.0f}",
            sent[row.name],
        )
        for row in rows
    ]
    print(table([HEADINGS, *cells]))
    for name, why in failed.items():
        print(f"{name} does not compile: {why}")
    print(f"{len(rows)} configurations in {time.perf_counter() - begun:.0f} s")
    if args.json:
        numbers = {
            name: {"flops": dict(counts.flops), "traffic": counts.traffic, "sent": sent[name]}
            for name, counts in counted.items()
        }
        told = {"rows": [row.to_json() for row in rows], "failed": failed, "counted": numbers}
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
