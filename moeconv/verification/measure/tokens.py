"""The rows of tokens that both models are run on: running text as in training, and any ids at all.

Rows are packed: documents follow each other, each with the ids that the tokenizer puts around it,
without padding, from position 0 to the row's end. Short prompts would hide a wrong RoPE.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.errors import MoeconvError, UsageError
from moeconv.maxtext.sidecar import SIDECAR_NAMES, RunSidecar
from moeconv.orbax.locate import Step
from moeconv.tensor.axes import Array
from moeconv.untrusted.files import read_inside, read_regular
from moeconv.verification.boundary import blaming
from moeconv.verification.checks import CandidateError

KINDS = TEXT, RANDOM = "text", "random"


@dataclass(frozen=True)
class Rows:
    """What is run.

    Attributes:
        tokens: [B, T] ids.
        kinds: `TEXT` or `RANDOM` for every row.
        text: Where the text came from; why there is none, if there is none.
    """

    tokens: Array
    kinds: tuple[str, ...]
    text: str

    @property
    def targets(self) -> Array:
        """[B, T] the next token of every position, -1 at a row's end."""
        after = np.roll(self.tokens, -1, axis=1)
        after[:, -1] = -1
        return after

    def mask(self, kind: str) -> Array:
        """[B * T], True for the positions of one kind."""
        return np.repeat([k == kind for k in self.kinds], self.tokens.shape[1])


@dataclass(frozen=True)
class Sample:
    """Documents and where they came from."""

    documents: tuple[str, ...]
    origin: str


def make_rows(
    folder: Path,
    sample: Sample | None,
    *,
    count: int,
    vocab_size: int,
    context: int,
    eos: Any = None,
) -> Rows:
    """Rows of text and of random ids, at least `count` positions of each.

    Args:
        folder: Of the tokenizer that makes the text ids, if there is one.
        sample: The text.
        count: Positions of each kind.
        vocab_size: Random ids are drawn from all of them.
        context: The model's context length, and a row's at most.
        eos: The id, or a list of ids, between documents; none where it is no such thing.
    """
    length = min(count, context)
    rows = -(-count // length)
    text, origin = None, "the model has no tokenizer, so only random ids were run"
    if (folder / "tokenizer.json").is_file() and sample is not None:
        text, origin = (
            _packed(folder, sample.documents, rows, length, vocab_size, eos),
            sample.origin,
        )
    random = np.random.default_rng(0).integers(0, vocab_size, (rows, length))
    kinds = (TEXT,) * (rows if text is not None else 0) + (RANDOM,) * rows
    tokens = random if text is None else np.concatenate([text, random])
    return Rows(tokens.astype(np.int32), kinds, origin)


def _packed(
    folder: Path, documents: Sequence[str], rows: int, length: int, vocab_size: int, eos: Any
) -> Array:
    """Documents one after the other, begun anew when they are used up."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    eos = eos[0] if isinstance(eos, list) and eos else eos
    end = [eos] if isinstance(eos, int) else []
    stream: list[int] = []
    with blaming(f"{path} cannot be used", check="tokenizer"):
        tokenizer = Tokenizer.from_str(read_inside(folder, path.name).decode())
        for encoded in tokenizer.encode_batch(list(documents)):
            stream += encoded.ids if encoded.ids[-1:] == end else [*encoded.ids, *end]
    if not stream:
        raise UsageError("the text holds no tokens; give another one with --prompts")
    ids = np.resize(np.asarray(stream), rows * length).reshape(rows, length)
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise CandidateError(
            f"{path} makes ids {ids.min()} to {ids.max()}, but the model has {vocab_size} rows",
            "tokenizer",
        )
    return ids


def find_sample(prompts: Path | None, step: Step | None) -> Sample:
    """The text: the user's, the run's own (its sidecar names it), or the packaged one.

    Raises:
        UsageError: The user's file cannot be read or is empty.
    """
    if prompts is not None:
        try:
            documents = split_documents(read_regular(prompts).decode())
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"--prompts {prompts} cannot be read as UTF-8 text: {why}") from None
        if not documents:
            raise UsageError(
                f"--prompts {prompts} is empty; put documents in it, an empty line between two"
            )
        return Sample(documents, str(prompts))
    if step is not None and (own := _run_sample(step)) is not None:
        return own
    text = (
        resources.files("moeconv.verification")
        .joinpath("data/sample.txt")
        .read_text(encoding="utf-8")
    )
    return Sample(split_documents(text), "the text that comes with moeconv")


def _run_sample(step: Step) -> Sample | None:
    """The text sample of a run's sidecar, if it has one."""
    for folder, sidecar in itertools.product(step.beside, SIDECAR_NAMES):
        try:
            raw = folder.read(sidecar)
            if raw is None:
                continue
            name = RunSidecar.model_validate_json(raw).text_sample
            content = folder.read(name) if name else None
        except (MoeconvError, ValueError):
            continue
        if content and (documents := split_documents(content.decode("utf-8", "replace"))):
            return Sample(documents, f"the run's own text ({folder / str(name)})")
    return None


def split_documents(text: str) -> tuple[str, ...]:
    """Documents of a text file: empty lines separate them."""
    return tuple(part.strip() for part in text.split("\n\n") if part.strip())
