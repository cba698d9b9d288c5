"""What each setting costs in memory and matmuls on 2xT4: MaxText's train step, compiled for them.

No GPU is needed, but the CUDA plugin of JAX; see docs/memory.md. XLA's own numbers.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import _hlo
from _measure import table

# Settings over the recipe, and values that MaxText's YAML cannot say (aot.py).
CONFIGURATIONS: list[tuple[str, dict[str, object], dict[str, object]]] = [
    ("the recipe", {}, {}),
    ("remat_policy=minimal_with_context", {"remat_policy": "minimal_with_context"}, {}),
    ("num_vocab_tiling=4", {"num_vocab_tiling": 4}, {}),
    ("remat_policy=save_dot_except_mlpwi", {"remat_policy": "save_dot_except_mlpwi"}, {}),
    ("remat_policy=full", {"remat_policy": "full"}, {}),
    (
        "remat_policy=full num_vocab_tiling=4",
        {"remat_policy": "full", "num_vocab_tiling": 4},
        {},
    ),
    (
        "remat_policy=full scan_layers=true",
        {"remat_policy": "full", "scan_layers": True},
        {},
    ),
    ("no rematerialisation at all", {}, {"remat_policy": "none"}),
    (
        "per_device_batch_size=2 gradient_accumulation_steps=2",
        {"per_device_batch_size": 2, "gradient_accumulation_steps": 2},
        {},
    ),
    (
        "the same, no rematerialisation at all",
        {"per_device_batch_size": 2, "gradient_accumulation_steps": 2},
        {"remat_policy": "none"},
    ),
    ("dtype=bfloat16", {"dtype": "bfloat16"}, {}),
    ("dtype=float32", {"dtype": "float32"}, {}),
]


def main() -> None:
    """Prints the table."""
    from moeconv_train.preflight import T4X2
    from moeconv_train.preflight.memory import STOCK, Patch, PluginMissingError, Variant, measure
    from moeconv_train.preflight.report import MEMORY_HEADINGS, memory_cells
    from moeconv_train.recipe import read_config
    from moeconv_train.settings import read_settings, run_file_of

    parser = argparse.ArgumentParser(description=__doc__)
    recipes = Path(__file__).resolve().parents[1] / "train" / "configs"
    default = recipes / "llama3_moe_200m_tinystories.yml"
    parser.add_argument("recipe", nargs="?", type=Path, default=default)
    parser.add_argument("--stock", action="store_true", help="without the trainer's patches")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args()

    recipe, begun = read_config(args.recipe), time.perf_counter()
    settings = read_settings(run_file_of(args.recipe), {})
    # What the recipe says itself need not be compiled again.
    configurations = [
        Variant(name, *parts)
        for name, *parts in CONFIGURATIONS
        if not parts[0] or {**recipe, **parts[0]} != recipe
    ]
    with tempfile.TemporaryDirectory() as texts:
        try:
            report = measure(
                recipe,
                T4X2,
                variants=configurations,
                until_fit=False,
                patch=STOCK if args.stock else Patch(arguments=settings.patches),
                hlo=Path(texts),
                progress=lambda text: print(text, file=sys.stderr, flush=True),
            )
        except PluginMissingError as error:
            sys.exit(f"{error}")
        written = {row.name: Path(texts, f"{row.name}.hlo").read_text() for row in report.rows}
    counted = {name: _hlo.count(text) for name, text in written.items()}
    sent = {name: _hlo.sent(text) for name, text in written.items()}
    print(
        f"{args.recipe.name}: {report.parameters:,} parameters, a train state of "
        f"{report.state_bytes / 2**30:.2f} GiB; {report.target}, "
        f"{'stock MaxText' if args.stock else 'with loss scaling and patches'}; GiB a device"
    )
    cells = [
        (
            *memory_cells(row),
            f"{sum(counted[row.name].flops.values()) / 1e12:.2f}",
            f"{counted[row.name].traffic / 1e9:.0f}",
            sent[row.name],
        )
        for row in report.rows
    ]
    print(table([(*MEMORY_HEADINGS, "TFLOP", "GB moved", "MB all-reduced"), *cells]))
    for name, why in report.failed.items():
        print(f"{name} does not compile: {why}")
    print(f"{len(report.rows)} configurations in {time.perf_counter() - begun:.0f} s")
    if args.json:
        numbers = {
            name: {"flops": dict(counts.flops), "traffic": counts.traffic, "sent": sent[name]}
            for name, counts in counted.items()
        }
        told = {**report.model_dump(mode="json"), "counted": numbers}
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
