"""The text of a model card: what is known of the model, and nothing that is not."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from moeconv.arch.counts import count
from moeconv.arch.description import ModelDescription
from moeconv.artifact.names import LOSS_PLOT
from moeconv.families import blocks, targets
from moeconv.hub.gate import Judgement
from moeconv.hub.local import Output
from moeconv.hub.public import own_paths, shorten, tail
from moeconv.hub.usage import usage
from moeconv.maxtext.run_record import RunRecord
from moeconv.sizes import format_count
from moeconv.verification.checks import Check, Status
from moeconv.verification.report.files import PAGE_NAME
from moeconv.verification.report.markdown import verdict_line
from moeconv.verification.report.plots import ERROR_PLOT, KL_PLOT, LOGIT_PLOT, parity_of
from moeconv.verification.report.tables import code, plain, table

_SETTINGS = {
    "global_batch_size_to_train_on": "sequences a step",
    "per_device_batch_size": "sequences a device and step",
    "gradient_accumulation_steps": "gradient accumulation steps",
    "max_target_length": "tokens a sequence",
    "dtype": "dtype of the computation",
    "weight_dtype": "dtype of the weights",
    "grad_dtype": "dtype of the gradients",
    "opt_type": "optimizer",
    "learning_rate": "peak learning rate",
    "lr_schedule_type": "schedule",
    "warmup_steps_fraction": "warmup, share of the steps",
    "learning_rate_final_fraction": "final learning rate, share of the peak",
    "adam_b1": "Adam β₁",
    "adam_b2": "Adam β₂",
    "adam_eps": "Adam ε",
    "adam_weight_decay": "weight decay",
    "gradient_clipping_threshold": "gradient clipping",
    "load_balance_loss_weight": "weight of the load-balancing loss",
    "capacity_factor": "expert capacity factor (-1: no token is dropped)",
    "hardware": "hardware",
    "ici_data_parallelism": "data-parallel devices",
    "ici_fsdp_parallelism": "FSDP devices",
    "remat_policy": "rematerialisation",
}
_FIGURES = (
    ("positions", "positions compared", "d"),
    ("kl_mean", "KL divergence of the next token, mean (nats)", ".2e"),
    ("kl_max", "KL divergence of the next token, largest (nats)", ".2e"),
    ("max_abs", "largest difference of a logit", ".2e"),
    ("top1_agreement", "same most likely token", ".2%"),
    ("perplexity_reference", "perplexity, MaxText", ".5g"),
    ("perplexity_candidate", "perplexity, this model", ".5g"),
)

# Warnings of convert that are advice for the conversion, or that the card has elsewhere.
_NOT_FOR_READERS = ("no tokenizer was given", "newer steps are", "--untie", "the dense MLP of")


@dataclass(frozen=True)
class CardInput:
    """What a card is made of.

    Attributes:
        output: What is pushed.
        judgement: What is known of it.
        repo_id: Where it goes.
        revision: The branch.
        parameters: Numbers in the safetensors files.
        names: Files that go beside the card.
        license_id: Of the model.
    """

    output: Output
    judgement: Judgement
    repo_id: str
    revision: str
    parameters: int
    names: Collection[str]
    license_id: str | None = None


def card_body(given: CardInput) -> str:
    """Everything below the metadata."""
    sections = [
        f"# {given.repo_id.split('/')[-1]}",
        *_intro(given),
        "## How to use it",
        *usage(given.output, given.repo_id, given.revision),
        "## Architecture",
        *_architecture(given),
    ]
    training = _training(given)
    if training:
        sections += ["## Training", *training]
    if licenses := _licenses(given):
        sections += ["## Licenses", licenses]
    sections += ["## Conversion", *_conversion(given), "## Verification", *_verification(given)]
    return "\n" + "\n\n".join(sections) + "\n"


def _intro(given: CardInput) -> list[str]:
    model = given.output.model
    counts = count(model, blocks()[model.decoder_block])
    kind = "Mixture-of-Experts language model" if model.moe_layers else "language model"
    used = f", of which a token uses {format_count(counts.active)}" if model.moe_layers else ""
    parts = [
        f"A {kind} with {format_count(counts.total)} parameters{used}, trained with "
        "[MaxText](https://github.com/AI-Hypercomputer/maxtext) and converted to Hugging Face "
        f"files by moeconv {plain(given.output.manifest.moeconv_version)}."
    ]
    if not given.judgement.verified:
        parts.append(
            "> [!WARNING]\n> **Not verified.** It is not proven that this is the model that was "
            "trained: "
            f"{_public(given, given.judgement.problem or '')}."
        )
    return parts


def _architecture(given: CardInput) -> list[str]:
    output, model = given.output, given.output.model
    counts = count(model, blocks()[model.decoder_block])
    heads = f"{model.num_attention_heads} query, {model.num_key_value_heads} key/value"
    rows = [
        ("architecture", code(output.manifest.architecture)),
        ("parameters", f"{counts.total:,}"),
    ]
    if model.moe_layers:
        rows.append(("parameters that a token uses", f"{counts.active:,}"))
    rows.append(("parameters of the token embedding, included", f"{counts.embedding:,}"))
    if given.parameters != counts.total:
        rows.append(("numbers in the files", f"{given.parameters:,}"))
    rows.append(("layers", _layers(output)))
    rows += [
        ("hidden size", f"{model.hidden_size:,}"),
        ("attention heads", f"{heads}, of size {model.head_dim}"),
    ]
    if model.dense_layers:
        rows.append(("width of a dense MLP", f"{model.intermediate_size:,}"))
    if model.moe_layers:
        rows += [
            ("experts in a MoE layer", f"{model.num_experts}, {model.num_experts_per_tok} a token"),
            ("width of an expert", f"{model.moe_intermediate_size:,}"),
        ]
    rows += [
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_position_embeddings:,} tokens"),
        _positions(model),
        ("norm", f"{blocks()[model.decoder_block].norm}, ε = {model.rms_norm_eps:g}"),
        ("output head", "tied to the embedding" if model.tie_word_embeddings else "its own"),
        ("dtype of the files", plain(output.manifest.dtype)),
    ]
    parts = [table(("", ""), rows)]
    return [*parts, *targets()[output.manifest.target].card(model)]


def _positions(model: ModelDescription) -> tuple[str, str]:
    if model.num_positions:
        return "learned positions", f"{model.num_positions:,}"
    return "RoPE", f"θ = {model.rope_theta:,.0f}" + (", scaled" if model.rope_use_scale else "")


def _layers(output: Output) -> str:
    model = output.model
    if not model.moe_layers or not model.dense_layers:
        return f"{model.num_hidden_layers}, all {'MoE' if model.moe_layers else 'dense'}"
    numbers = ", ".join(str(n + 1) for n in model.moe_layers)
    return f"{model.num_hidden_layers}, MoE on {numbers}, dense on the others"


def _training(given: CardInput) -> list[str]:
    run, step = given.output.manifest.run, given.output.manifest.source.step
    parts, rows = [], []
    facts = run.facts if run else None
    if dataset := given.output.dataset:
        rows.append(("data", f"[{dataset}](https://huggingface.co/datasets/{dataset})"))
    if run and run.maxtext_version:
        rows.append(("MaxText", plain(run.maxtext_version)))
    if step is not None:
        planned = (
            facts.steps if facts and facts.steps else run.settings.get("steps") if run else None
        )
        of = f" of {planned:,}" if isinstance(planned, int) and planned > step + 1 else ""
        rows.append(("steps", f"{step + 1:,}{of}"))
        if facts and facts.epochs and not of:
            rows.append(("epochs", f"{facts.epochs:g}"))
    if run is not None:
        rows += _tokens(run, step)
        rows += [
            (label, _setting(run.settings[k]))
            for k, label in _SETTINGS.items()
            if k in run.settings
        ]
        if facts and facts.dataset_digest:
            rows.append(("SHA-256 of the prepared data", code(facts.dataset_digest)))
    if rows:
        parts.append(table(("", ""), rows))
    if run is not None and (run.train or run.evaluation):
        parts += _losses(run, LOSS_PLOT in given.names)
    return parts


def _licenses(given: CardInput) -> str:
    """Those of what the model was made from, where the run states one, beside its own."""
    run = given.output.manifest.run
    facts = run.facts if run else None
    if facts is None or not (facts.tokenizer_license or facts.data_license):
        return ""
    rows = [("the model", given.license_id)] if given.license_id else []
    rows += [
        ("its tokenizer", facts.tokenizer_license or "not stated"),
        ("the training data", facts.data_license or "not stated"),
    ]
    return table(("of", "license"), [(of, plain(text)) for of, text in rows])


def _tokens(run: RunRecord, step: int | None) -> list[tuple[str, str]]:
    if run.train is not None and run.train.tokens is not None:
        return [("tokens", f"{run.train.tokens:,}")]
    if run.facts and run.facts.tokens_per_step and step is not None:
        return [("positions", f"{run.facts.tokens_per_step * (step + 1):,}, padding included")]
    return []


def _losses(run: RunRecord, plot: bool) -> list[str]:
    rows = []
    for name, found in (("training", run.train), ("evaluation", run.evaluation)):
        if found is not None:
            perplexity = f"{math.exp(found.loss):.4g}" if found.loss < 50 else "—"
            rows.append((name, f"{found.step:,}", f"{found.loss:.4f}", perplexity))
    heads = ("last loss", "after step", "cross entropy (nats per token)", "perplexity")
    picture = [f"![Loss of training and evaluation]({LOSS_PLOT})"] if plot else []
    return [table(heads, rows), *picture]


def _conversion(given: CardInput) -> list[str]:
    manifest = given.output.manifest
    source = manifest.source
    parts = [
        f"Made by `moeconv convert` {plain(manifest.moeconv_version)} from "
        f"{code(tail(source.path))} ({plain(source.format)}; {plain(source.layout)}), whose "
        f"{len(source.arrays)} arrays have the digest {code(source.digest)}. "
        f"`{given.output.manifest_name}` has the SHA-256 of every array that was read and of every "
        "file that was written."
    ]
    notes = [
        f"{plain(fold.factor)} was folded into {code(fold.target)} "
        f"({'exact' if fold.exact else 'rounded once'}): {plain(fold.reason)}."
        for fold in manifest.folds
    ]
    notes += [f"{plain(name)} is left out: {plain(why)}." for name, why in manifest.dropped.items()]
    notes += [
        f"{_public(given, text)}."
        for text in manifest.warnings
        if not text.startswith(_NOT_FOR_READERS)
        and not text.endswith(tuple(manifest.dropped.values()))
    ]
    return [*parts, *([_list(notes)] if notes else [])]


def _verification(given: CardInput) -> list[str]:
    judgement = given.judgement
    report = judgement.report
    if report is None:
        return [f"None: {_public(given, judgement.problem or '')}."]
    parts = [f"**{_public(given, verdict_line(report))}**"]
    if judgement.problem is not None:
        parts.append(f"Not enough to be called verified: {_public(given, judgement.problem)}.")
    rows = []
    for level, status in report.levels.items():
        checks = [c for c in report.checks if c.level == level and c.status is not Status.SKIP]
        rows.append((level, status.value, _public(given, _summary(checks))))
    parts.append(table(("level", "verdict", "what was found"), rows))
    if (parity := parity_of(report)) is not None:
        parts.append(table(("", ""), _figures(parity)))
    if judgement.warnings:
        parts += ["Warnings:", _list(_public(given, text) for text in judgement.warnings)]
    if judgement.skipped:
        parts += ["Not run:", _list(_public(given, text) for text in judgement.skipped)]
    parts += [f"![{n}]({n})" for n in (KL_PLOT, ERROR_PLOT, LOGIT_PLOT) if n in given.names]
    page = f"[{PAGE_NAME}]({PAGE_NAME}) has every figure; " if PAGE_NAME in given.names else ""
    parts.append(
        f"{page}`verify.json` is bound to the SHA-256 of every file: a change of one byte voids it."
    )
    return parts


# The check that stands for its level: what transformers builds, every value, the logits.
_TELLING = ("transformers", "values", "parity")


def _summary(checks: Sequence[Check]) -> str:
    """What a level has to say: of logits and layers the comparison, else its worst or its last."""
    if not checks:
        return ""
    order = (Status.FAIL, Status.WARN)
    for status in order:
        for check in checks:
            if check.status is status:
                return check.summary
    return next((c.summary for c in checks if c.name in _TELLING), checks[-1].summary)


def _figures(parity: Check) -> list[tuple[str, str]]:
    # Perplexity of random ids means nothing: running text alone, where there was some.
    kind = "text" if parity.metrics.get("text") else "all"
    figures = parity.metrics.get(kind) or {}
    compared = "running text" if kind == "text" else "random ids"
    return [
        ("what was run", compared),
        *(
            (label, format(int(figures[key]) if style == "d" else figures[key], style))
            for key, label, style in _FIGURES
            if figures.get(key) is not None
        ),
    ]


def _public(given: CardInput, text: str) -> str:
    """A sentence from a report, without paths of the machine that wrote it."""
    return plain(shorten(text, own_paths(given.output))).rstrip(".")


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else plain(str(value))


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)
