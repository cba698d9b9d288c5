"""The tokenizer beside the weights: that it fits the model, and that it is the run's own."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import StorageError, TokenizerError
from moeconv.hf.tokenizer import check_fits, read_tokenizer
from moeconv.maxtext.checkpoint import find_sidecar
from moeconv.maxtext.tokenizer import run_tokenizer
from moeconv.untrusted import strict_json
from moeconv.verification.boundary import blaming
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.files import read_object
from moeconv.verification.levels import Level
from moeconv.verification.models.transformers_load import load_tokenizer, quiet

_STRUCTURE, _WEIGHTS = CheckFactory(Level.STRUCTURE), CheckFactory(Level.WEIGHTS)
_SAMPLE = (
    "Once upon a time there was a little mixture of experts. It said: «Good morning!»",
    "  Two spaces, a tab\tand a line\nbreak; 3.14159 × 10⁻⁵, naïve café, 日本語, 🙂",
)
# Of a tokenizer.json, beside its tokens and merges: what another release may write differently.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_tokenizer(candidate: Candidate) -> Check:
    """Level structure: ids within the vocabulary, and a text that comes back as it went in.

    Raises:
        TokenizerError: It cannot be read, or has ids that the model has no rows for.
    """
    if not (candidate.out / "tokenizer.json").is_file():
        return _STRUCTURE.skipped("tokenizer", "the model was written without a tokenizer")
    tokenizer = read_tokenizer(str(candidate.out), model_max_length=None)
    notes, config = check_fits(tokenizer, candidate.model.vocab_size), candidate.config
    wrong = [
        f"{name}: {getattr(tokenizer, name)} in the tokenizer, {config.get(name)} in config"
        for name in ("bos_token_id", "eos_token_id")
        if getattr(tokenizer, name) not in (None, *_several(config.get(name)))
    ]
    if wrong:
        return _STRUCTURE.failed("tokenizer", "; ".join(wrong))
    if importlib.util.find_spec("transformers") is not None:
        if candidate.wrong_keys:  # transformers chooses the tokenizer by config.json
            why = "not loaded by transformers, since config.json is not the described model's"
            return _STRUCTURE.skipped("tokenizer", why)
        what = f"transformers cannot load the tokenizer of {candidate.out}"
        with blaming(what, check="tokenizer"), quiet():
            bad = _round_trip(candidate.out)
        if bad is not None:
            return _STRUCTURE.failed("tokenizer", f"text does not survive the tokenizer: {bad!r}")
    if notes:
        return _STRUCTURE.warned("tokenizer", "; ".join(notes))
    summary = f"{tokenizer.size} tokens fit {candidate.model.vocab_size} rows"
    return _STRUCTURE.passed("tokenizer", summary)


def _several(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def check_own_tokenizer(candidate: Candidate) -> list[Check]:
    """Level weights: the tokenizer is the one that the run trained with, if the run kept it.

    A stale one of the same size fits the model, survives every round trip, and gives each token
    another token's row.

    Raises:
        CandidateError: OUT's tokenizer cannot be read.
        ConfigError: The run's sidecar cannot be read.
    """
    sidecar = find_sidecar(candidate.step, needed=False)
    if sidecar is None or sidecar.content.tokenizer is None:
        return []
    path = candidate.out / "tokenizer.json"
    if not path.is_file():
        return [_WEIGHTS.skipped("tokenizer", "the model was written without a tokenizer")]
    try:
        own = run_tokenizer(sidecar, model_max_length=None)
    except (TokenizerError, StorageError) as error:
        why = f"not compared with the run's own, which cannot be read: {error}"
        return [_WEIGHTS.warned("tokenizer", why)]
    place, trained = own.source, strict_json.loads(own.files["tokenizer.json"])
    with blaming(f"{path} cannot be compared with the run's own", check="tokenizer"):
        read_tokenizer(str(candidate.out), model_max_length=None)
        written = read_object(path, "tokenizer")
        apart = _other_ids(trained, written)
    if apart:
        return [
            _WEIGHTS.failed(
                "tokenizer",
                f"{path.name} is not the tokenizer that the run trained with ({place}): {apart}; "
                "convert again without --tokenizer",
                tensors=[path.name],
            )
        ]
    if steps := [step for step in _STEPS if trained.get(step) != written.get(step)]:
        return [
            _WEIGHTS.warned(
                "tokenizer",
                f"{path.name} has the tokens and merges of the run's own tokenizer "
                f"({place}), but another {' and '.join(steps)}",
                tensors=[path.name],
            )
        ]
    return [_WEIGHTS.passed("tokenizer", f"the tokenizer is the run's own ({place})")]


def _other_ids(trained: Mapping[str, Any], written: Mapping[str, Any]) -> str | None:
    """What gives a text other ids."""
    ours, theirs = _ids(trained), _ids(written)
    if moved := sorted(t for t in ours | theirs if ours.get(t) != theirs.get(t)):
        return (
            f"{len(moved)} tokens have other ids, {moved[0]!r} has {theirs.get(moved[0])} instead "
            f"of {ours.get(moved[0])}"
        )
    if trained["model"].get("merges") != written["model"].get("merges"):
        return "its merges are others"
    return None


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Id of every token; a Unigram model lists its tokens in order."""
    vocabulary = tokenizer["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _round_trip(folder: Path) -> str | None:
    """A text that encoding and decoding changes, if any.

    A normaliser may change the text once: then what was decoded must have the same ids. Characters
    that the tokenizer does not know are left out of it.
    """
    tokenizer = load_tokenizer(folder)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    for text in _SAMPLE:
        unknown = tokenizer.unk_token_id
        known = "".join(c for c in text if unknown is None or unknown not in ids(c))
        again = tokenizer.decode(ids(known), clean_up_tokenization_spaces=False)
        normalises = tokenizer.backend_tokenizer.normalizer is not None
        if again != known and not (normalises and ids(again) == ids(known)):
            return text
    return None
