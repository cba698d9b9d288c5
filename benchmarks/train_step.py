"""One step of training: MaxText and what makes it cheaper, transformers, and what the device could.

    python benchmarks/train_step.py [--size recipe] [--dtype float16] [--steps 5] [--json FILE]
    python benchmarks/train_step.py --t4       # compiled for two T4s that need not be there

Every contender is a process of its own on one device, with the same model, batch and precision, and
the loss without its balance term. --t4 needs JAX's CUDA plugin (docs/memory.md) and runs nothing.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _hlo
from _measure import measure, table

HERE = Path(__file__).resolve().parent
RECIPES = {
    "interleaved": "llama3_moe_200m_tinystories.yml",
    "all MoE": "llama3_moe_200m_tinystories_all_moe.yml",
}
# The recipe's shape, a hundredth of its work: for a machine without a GPU.
SMALL = {
    "base_num_decoder_layers": 4,
    "base_emb_dim": 256,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "base_mlp_dim": 1024,
    "base_moe_mlp_dim": 1024,
    "vocab_size": 8192,
    "max_target_length": 512,
    "per_device_batch_size": 2,
}
# A test of the bench.
TINY = {
    **SMALL,
    "base_num_decoder_layers": 2,
    "base_emb_dim": 128,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 128,
    "base_moe_mlp_dim": 128,
    "vocab_size": 512,
    "max_target_length": 64,
}
SIZES: dict[str, dict[str, Any]] = {"tiny": TINY, "small": SMALL, "recipe": {}}
VARIANTS: dict[str, dict[str, bool]] = {
    "MaxText": {},
    "MaxText, expert tiles": {"expert_tiles": True},
    "MaxText, attention blocks": {"attention_blocks": True},
    "MaxText, both": {"expert_tiles": True, "attention_blocks": True},
}
PEER = "transformers"
# NVIDIA's T4 datasheet: FP16 by tensor cores, FP32, GDDR6.
T4 = {"f16": 65e12, "f32": 8.1e12, "bytes": 320e9}


@dataclass(frozen=True)
class Result:
    """One contender's steps."""

    name: str
    seconds: float
    rss: int
    told: dict[str, Any] = field(repr=False)

    @property
    def cpu(self) -> float:
        """Of both cores together: what counts where others use the machine too."""
        return statistics.median(self.told["cpu"])

    @property
    def memory(self) -> float:
        """On a GPU what its framework allocated at most, on a CPU all of the process."""
        return self.told["peak"] or self.rss


def say(text: str = "") -> None:
    print(text, flush=True)


def model_flops(keys: dict[str, Any]) -> float:
    """What one step of this model asks for: two of eight experts, the past only, nothing twice."""
    from moeconv_train.model_size import model_size
    from moeconv_train.preflight.config import resolve

    size = model_size(resolve(keys))
    assert size is not None, "the recipes' decoder blocks are known"
    return size.flops * positions(keys)


def positions(keys: dict[str, Any]) -> int:
    """Tokens of one step on one device."""
    return int(keys["per_device_batch_size"]) * int(keys["max_target_length"])


def contend(names: list[str], script: str, spec: dict[str, Any], work: Path) -> list[Result]:
    """Runs one process and reads what it says last: a line for each of these contenders."""
    log = work / f"{names[0]}.log".replace(" ", "_").replace(",", "")
    run = measure([sys.executable, HERE / script, json.dumps(spec)], log)
    lines = log.read_text(encoding="utf-8").splitlines()[-len(names) :]
    told = [json.loads(line) for line in lines]
    return [
        Result(name, statistics.median(each["seconds"]), run.rss, each)
        for name, each in zip(names, told, strict=True)
    ]


def compare(model: str, keys: dict[str, Any], args: argparse.Namespace) -> list[Result]:
    """All contenders of one model, in turn."""
    # Mixtral and MaxText scale the balance loss differently; without it both losses are one number.
    spec = {"keys": {**keys, "load_balance_loss_weight": 0.0}, "steps": args.steps}
    groups = [list(VARIANTS)] if args.one_process else [[name] for name in VARIANTS]
    jobs = [
        (names, "_train_maxtext.py", {**spec, "patches": [VARIANTS[name] for name in names]})
        for names in groups
    ]
    results = []
    for names, script, given in [*jobs, ([PEER], "_train_torch.py", spec)]:
        print(f"{model}: {'; '.join(names)} …", file=sys.stderr, flush=True)
        results += contend(names, script, given, args.work)
    counts = {each.told["parameters"] for each in results}
    if len(counts) != 1:
        sys.exit(f"{model}: the contenders are not of one size: {sorted(counts)} parameters")
    return results


def show(results: list[Result], keys: dict[str, Any], rates: dict[str, Any]) -> None:
    """Times, and how they compare with the first contender, the peer and the device."""
    first, peer = results[0], results[-1]
    asked = model_flops(keys)
    ratios = [f"{what} / {other}" for other in ("MaxText", PEER) for what in ("time", "CPU")]
    figures = ("step s", "(from … to)", "CPU s", "tokens/s", "MFU", "step / floor", "peak GB")
    rows: list[tuple[str, ...]] = [("", *figures, *ratios)]
    for each in results:
        walls = each.told["seconds"]
        rows.append(
            (
                each.name,
                f"{each.seconds:.3f}",
                f"{min(walls):.3f} to {max(walls):.3f}",
                f"{each.cpu:.2f}",
                f"{positions(keys) / each.seconds:,.0f}",
                f"{asked / each.seconds / rates['flops']:.0%}",
                "" if each is peer else f"{each.seconds / floor_of(each, rates):.2f}",
                f"{each.memory / 1e9:.2f}",
                *(
                    f"{value:.2f}"
                    for other in (first, peer)
                    for value in (each.seconds / other.seconds, each.cpu / other.cpu)
                ),
            )
        )
    say(table(rows))
    compiled = [each for each in results if each is not peer]
    rows = [
        ("compiled step", "matmul GFLOP", "GB moved", "planned GB", "compiling s", "first loss")
    ]
    rows += [
        (
            each.name,
            f"{each.told['flops'] / 1e9:,.0f}",
            f"{each.told['bytes'] / 1e9:.1f}",
            f"{each.told['planned'] / 1e9:.2f}",
            f"{each.told['compiling']:.0f}",
            f"{each.told['losses'][0]:.4f}",
        )
        for each in compiled
    ]
    say(f"\n{table(rows)}\n\n{PEER}: {peer.told['how']}; first loss {peer.told['losses'][0]:.4f}")


def floor_of(result: Result, rates: dict[str, Any]) -> float:
    """The roofline of a compiled step: its matmuls or its bytes at the device's best rate."""
    return max(result.told["flops"] / rates["flops"], result.told["bytes"] / rates["bytes"])


def for_t4s(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Each variant, compiled for two T4s: XLA's numbers, and T4's datasheet on them."""
    from moeconv_train.preflight.memory import Variant, measure
    from moeconv_train.preflight.target import T4X2

    variants = [Variant(name, {}, patches) for name, patches in VARIANTS.items()]
    with tempfile.TemporaryDirectory() as texts:
        rows, failed = measure(
            {**keys, "eval_interval": -1},  # the train step alone
            T4X2,
            variants,
            hlo=Path(texts),
        )
        if failed:
            sys.exit(f"not every variant compiles: {failed}")
        written = [Path(texts, f"{row.name}.hlo").read_text() for row in rows]
    return [
        {
            **row.to_json(),
            "matmul_flops_by_type": dict(counts.flops),
            "traffic": counts.traffic,
            "matmul_seconds": sum(count / T4[kind] for kind, count in counts.flops.items()),
            "memory_seconds": counts.traffic / T4["bytes"],
            "sent": _hlo.sent(text),
        }
        for row, text in zip(rows, written, strict=True)
        for counts in [_hlo.count(text)]
    ]


def show_t4s(found: list[dict[str, Any]]) -> None:
    """The table of docs/performance.md."""
    rows = [
        (
            "2xT4",
            "FP16 TFLOP",
            "FP32 TFLOP",
            "GB moved",
            "MB all-reduced",
            "GiB",
            "matmuls s",
            "memory s",
            "ratio",
        )
    ]
    whole = [each["matmul_seconds"] + each["memory_seconds"] for each in found]
    for each, seconds in zip(found, whole, strict=True):
        by_type = each["matmul_flops_by_type"]
        rows.append(
            (
                each["name"],
                f"{by_type.get('f16', 0) / 1e12:.2f}",
                f"{by_type.get('f32', 0) / 1e12:.2f}",
                f"{each['traffic'] / 1e9:.0f}",
                each["sent"],
                f"{each['total'] / 2**30:.2f}",
                f"{each['matmul_seconds']:.3f}",
                f"{each['memory_seconds']:.3f}",
                f"{seconds / whole[0]:.2f}",
            )
        )
    say(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), help="default: small on a CPU")
    parser.add_argument("--dtype", help="default: float32 on a CPU, else the recipe's")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one (default 5)")
    parser.add_argument("--model", choices=tuple(RECIPES), help="one of both")
    parser.add_argument("--t4", action="store_true", help="compile for two T4s and count")
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="one for all of MaxText's: quicker, but of all together is the peak of memory",
    )
    parser.add_argument("--work", type=Path, default=Path("bench-out", "train_step"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    args = parser.parse_args()
    from moeconv_train.preflight.target import gpus
    from moeconv_train.recipe import read_config

    args.work.mkdir(parents=True, exist_ok=True)
    on_cpu = not gpus()
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if on_cpu else "cuda,cpu")
    report: dict[str, Any] = {}
    models = {args.model: RECIPES[args.model]} if args.model else RECIPES
    rates: dict[str, Any] = {}
    for model, file in models.items():
        keys = read_config(HERE.parent / "train" / "configs" / file)
        say(f"\n## {model}\n")
        if args.t4:
            report[model] = for_t4s(keys)
            show_t4s(report[model])
            continue
        size = args.size or ("small" if on_cpu else "recipe")
        keys["dtype"] = args.dtype or ("float32" if on_cpu else keys["dtype"])
        keys |= SIZES[size]
        if not rates:
            log = args.work / "rates.log"
            measure([sys.executable, HERE / "_rates.py", keys["dtype"]], log)
            rates = report["rates"] = json.loads(log.read_text().splitlines()[-1])
        results = compare(model, keys, args)
        say(
            f"{results[0].told['parameters']:,} parameters, {positions(keys):,} tokens a step, "
            f"{keys['dtype']}, on one {rates['device']}: at best {rates['flops'] / 1e9:,.0f} "
            f"GFLOP/s and {rates['bytes'] / 1e9:,.0f} GB/s, measured\n"
        )
        show(results, keys, rates)
        report[model] = {each.name: {**each.told, "rss": each.rss} for each in results}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
