"""Comparing two models by their logits, and the logits of a converted model."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeconv.errors import ConfigError, MoeconvError, TensorError, UsageError

_TOP = 5
# Rows taken together: at 128k tokens a block's float64 copies are some 100 MB.
_BLOCK = 32


@dataclass(frozen=True)
class LogitDifference:
    """How far a candidate's logits lie from the reference's, over all rows (positions).

    KL is that of the candidate's distribution from the reference's, in nats. `top5_agreement` is
    the mean share of the reference's five likeliest tokens that are among the candidate's.
    """

    max_abs: float
    mean_abs: float
    kl_max: float
    kl_mean: float
    top1_agreement: float
    top5_agreement: float
    std_reference: float


def compare_logits(reference: np.ndarray, candidate: np.ndarray) -> LogitDifference:
    """Compare logits [..., V] in float64."""
    if reference.shape != candidate.shape or reference.ndim < 1 or not reference.size:
        raise UsageError(
            "Only logits of one shape can be compared, "
            f"not {list(reference.shape)} with {list(candidate.shape)}."
        )
    vocabulary = reference.shape[-1]
    top = min(_TOP, vocabulary)
    absolute, divergence, first, shared = [], [], [], []
    total = squares = 0.0
    # The variance is summed about a value of the sample, lest large offsets cancel.
    origin = float(reference.reshape(-1)[0])
    for left, right in _blocks(reference, candidate):
        difference = np.abs(left - right)
        absolute.append((difference.max(), difference.sum()))
        log_left, log_right = _log_softmax(left), _log_softmax(right)
        divergence.append((np.exp(log_left) * (log_left - log_right)).sum(axis=-1))
        first.append(left.argmax(axis=-1) == right.argmax(axis=-1))
        shared.append(_shared(left, right, top))
        total += float((left - origin).sum())
        squares += float(((left - origin) ** 2).sum())
    size = reference.size
    # Rounding can leave a divergence of 0 slightly negative.
    kl = np.maximum(np.concatenate(divergence), 0.0)
    return LogitDifference(
        max_abs=float(max(largest for largest, _ in absolute)),
        mean_abs=float(sum(part for _, part in absolute) / size),
        kl_max=float(kl.max()),
        kl_mean=float(kl.mean()),
        top1_agreement=float(np.concatenate(first).mean()),
        top5_agreement=float(np.concatenate(shared).mean()),
        std_reference=float(np.sqrt(max(squares / size - (total / size) ** 2, 0.0))),
    )


def _blocks(
    reference: np.ndarray, candidate: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    vocabulary = reference.shape[-1]
    left, right = reference.reshape(-1, vocabulary), candidate.reshape(-1, vocabulary)
    for start in range(0, len(left), _BLOCK):
        pair = (
            left[start : start + _BLOCK].astype(np.float64),
            right[start : start + _BLOCK].astype(np.float64),
        )
        for name, block in zip(("reference", "candidate"), pair, strict=True):
            if not np.isfinite(block).all():
                raise TensorError(f"The logits of the {name} model are not all finite.")
        yield pair


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _shared(left: np.ndarray, right: np.ndarray, top: int) -> np.ndarray:
    """Per row, the share of the `top` likeliest tokens of `left` that are so in `right` too."""
    likeliest = [np.argpartition(-logits, top - 1, axis=-1)[:, :top] for logits in (left, right)]
    both = (likeliest[0][:, :, None] == likeliest[1][:, None, :]).any(axis=-1)
    result: np.ndarray = both.mean(axis=-1)
    return result


def hf_logits(
    model_dir: str | Path, tokens: np.ndarray, *, dtype: str = "float32", device: str = "cpu"
) -> np.ndarray:
    """Return the float32 logits [B, T, V] of a Hugging Face model directory, by transformers.

    Attention and experts run in their plain implementations. Nothing is fetched, no code of the
    directory is run, and a parameter that transformers would make up or leave out is an error.
    """
    model_dir = Path(model_dir)
    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir} is not a Hugging Face model: it has no config.json.")
    if not any(model_dir.glob("*.safetensors")):
        raise TensorError(f"{model_dir} is not a Hugging Face model: it has no *.safetensors.")
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        raise MoeconvError('transformers is not installed: pip install "moeconv[verify]".')
    import torch
    import transformers
    from transformers.utils import logging

    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError(
            f"Tokens must be integers [B, T], not {tokens.dtype} {list(tokens.shape)}."
        )
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, torch and safetensors
        raise TensorError(f"transformers cannot load {model_dir}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if wrong := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise TensorError(
            f"transformers does not load {model_dir} whole: "
            + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items())
        )
    model.to(device).eval()
    with torch.inference_mode():
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        logits = model(input_ids=ids, use_cache=False).logits
    result: np.ndarray = logits.float().cpu().numpy()
    return result
