"""Outputs of convert to push: converted in this process, with a verdict that speaks of them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import synthetic
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.levels import Level
from moeconv.verification.levels.parity import Parity, parity_checks
from moeconv.verification.measure.metrics import compare_logits
from moeconv.verification.measure.routing import Choice, compare_routing
from moeconv.verification.measure.tokens import TEXT, Rows
from moeconv.verification.report.files import write_report
from moeconv.verification.report.report import Report, make_report
from moeconv.verification.run import verify
from moeconv.verification.settings import VerifyOptions

FACTS = {
    "dataset": "roneneldan/TinyStories",
    "language": "en",
    "license": "cdla-sharing-1.0",
    "hub_repo": "alice/model",
    "steps": 8,
    "epochs": 2.0,
    "tokens_per_step": 512,
}
SETTINGS = {
    "learning_rate": 3e-5,
    "per_device_batch_size": 4.0,
    "adam_weight_decay": 0.1,
    "packing": True,
    "run_name": "never-told",
    "tokenizer_path": "/Users/somebody/secret",
}


def tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes: 258 ids."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate(["<s>", "</s>", *letters])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# What MaxText needs to build the model of `synthetic.SIZES`.
SIZES = {
    "base_emb_dim": 16,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 4,
    "base_num_decoder_layers": 4,
    "base_mlp_dim": 24,
    "base_moe_mlp_dim": 24,
    "num_experts": 4,
    "vocab_size": 260,
    "logits_via_embedding": True,
    "use_qk_norm": False,
    "use_post_ffw_norm": False,
    "megablox": False,
    "sparse_matmul": False,
    "capacity_factor": -1,
}


def write_run(run: Path, *, facts: dict | None = FACTS, steps: int = 8, **checkpoint) -> Path:
    """A run with a sidecar, a tokenizer and metrics; its last checkpoint is step 7."""
    made = synthetic.write(run, "envy", sizes={"V": 260}, step=steps - 1, **checkpoint)
    tokenizer(run / "tokenizer")
    sidecar = {
        "format": "moeconv-run",
        "version": 1,
        "maxtext_version": "0.2.5",
        "tokenizer": "tokenizer",
        "config": {**made.config, **SIZES, **SETTINGS},
        "run": facts,
    }
    (run / "moeconv_run.json").write_text(json.dumps(sidecar))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 3):
            line = {"kind": "train", "step": step, "loss": 6 - step / 2, "tokens": 500 * step}
            file.write(json.dumps(line) + "\n")
            if step % 4 == 0:
                file.write(
                    json.dumps({"kind": "eval", "step": step, "loss": math.log(step)}) + "\n"
                )
    return run


def convert_run(run: Path, out: Path, **options) -> Path:
    convert(plan_conversion(str(run), ConvertOptions(**options)), out)
    return out


def parity(
    noise: float,
    reference: str = "MaxText 0.2.5",
    against: str = "maxtext",
    length: int = 512,
) -> list[Check]:
    """The checks of level logits, of logits that differ by noise: what real runs give is tested
    in test_push_load.py; here only their form matters."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, (1, length)).astype(np.int32)
    rows = Rows(tokens, (TEXT,), "a test")
    right = rng.standard_normal((length, 30))
    other = compare_logits(right, right + noise * rng.standard_normal(right.shape), rows.targets)
    router = {1: rng.standard_normal((1, length, 4))}
    routing = compare_routing(router, router, choice=Choice(2), shape=(1, length))
    found = Parity(rows, other, other, other, routing)
    logits = CheckFactory(Level.LOGITS)
    return [
        logits.passed(
            "reference",
            f"{reference}, by the run's sidecar",
            metrics={"against": against},
        ),
        *parity_checks(logits, found, reference=reference),
        logits.passed("greedy", "all 24 greedy tokens are the same"),
    ]


def attest(out: Path, logits: list[Check] | None = None) -> Report:
    """Levels structure and weights as they are, and the given checks of level logits."""
    options = VerifyOptions(levels=("structure", "weights"))
    checks = [*verify(out, source=None, options=options).checks, *(logits or [])]
    report = make_report(Candidate.open(out), checks)
    write_report(report, out)
    return report


def copy(out: Path, to: Path) -> Path:
    shutil.copytree(out, to)
    return to
