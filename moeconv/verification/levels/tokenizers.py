"""The tokenizer beside the weights: that it fits the model, and that it is the run's own."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import StorageError, TokenizerError
from moeconv.hf.tokenizer import check_fits, read_tokenizer
from moeconv.maxtext.checkpoint import find_sidecar, run_tokenizer
from moeconv.untrusted import strict_json
from moeconv.verification.candidate import Subject, read_object
from moeconv.verification.checks import CandidateError, Check, Status, failed, passed, skipped
from moeconv.verification.models.transformers_load import load_tokenizer, quiet, told_of

_SAMPLE = (
    "Once upon a time there was a little mixture of experts. It said: «Good morning!»",
    "  Two spaces, a tab\tand a line\nbreak; 3.14159 × 10⁻⁵, naïve café, 日本語, 🙂",
)
# Of a tokenizer.json, beside its tokens and merges: what another release may write differently.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_tokenizer(subject: Subject) -> Check:
    """Level structure: ids within the vocabulary, and a text that comes back as it went in.

    Raises:
        TokenizerError: It cannot be read, or has ids that the model has no rows for.
    """
    if not (subject.out / "tokenizer.json").is_file():
        return skipped("structure", "tokenizer", "the model was written without a tokenizer")
    tokenizer = read_tokenizer(str(subject.out), model_max_length=None)
    notes = check_fits(tokenizer, subject.model.vocab_size)
    wrong = [
        f"{name}: {getattr(tokenizer, name)} in the tokenizer, {subject.config.get(name)} in config"
        for name in ("bos_token_id", "eos_token_id")
        if getattr(tokenizer, name) not in (None, *_several(subject.config.get(name)))
    ]
    if wrong:
        return failed("structure", "tokenizer", "; ".join(wrong))
    if importlib.util.find_spec("transformers") is not None:
        if subject.wrong_keys:  # transformers chooses the tokenizer by config.json
            why = "not loaded by transformers, since config.json is not the described model's"
            return skipped("structure", "tokenizer", why)
        with told_of(subject.out, CandidateError, "load the tokenizer of"), quiet():
            bad = _round_trip(subject.out)
        if bad is not None:
            return failed("structure", "tokenizer", f"text does not survive the tokenizer: {bad!r}")
    return Check(
        level="structure",
        name="tokenizer",
        status=Status.WARN if notes else Status.PASS,
        summary="; ".join(notes) or f"{tokenizer.size} tokens fit {subject.model.vocab_size} rows",
    )


def _several(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def check_own_tokenizer(subject: Subject) -> list[Check]:
    """Level weights: the tokenizer is the one that the run trained with, if the run kept it.

    A stale one of the same size fits the model, survives every round trip, and gives each token
    another token's row.

    Raises:
        CandidateError: OUT's tokenizer cannot be read.
        ConfigError: The run's sidecar cannot be read.
    """
    sidecar = find_sidecar(subject.step, needed=False)
    if sidecar is None or sidecar[0].tokenizer is None:
        return []
    path = subject.out / "tokenizer.json"
    if not path.is_file():
        return [skipped("weights", "tokenizer", "the model was written without a tokenizer")]
    try:
        own = run_tokenizer(*sidecar, model_max_length=None)
    except (TokenizerError, StorageError) as error:
        why = f"not compared with the run's own, which cannot be read: {error}"
        return [Check(level="weights", name="tokenizer", status=Status.WARN, summary=why)]
    place, trained = own.source, strict_json.loads(own.files["tokenizer.json"])
    try:
        read_tokenizer(str(subject.out), model_max_length=None)
    except TokenizerError as error:
        raise CandidateError(str(error), "tokenizer") from None
    written = read_object(path, "tokenizer")
    if apart := _other_ids(trained, written):
        return [
            failed(
                "weights",
                "tokenizer",
                f"{path.name} is not the tokenizer that the run trained with ({place}): {apart}; "
                "convert again without --tokenizer",
                tensors=[path.name],
            )
        ]
    if steps := [step for step in _STEPS if trained.get(step) != written.get(step)]:
        return [
            Check(
                level="weights",
                name="tokenizer",
                status=Status.WARN,
                summary=f"{path.name} has the tokens and merges of the run's own tokenizer "
                f"({place}), but another {' and '.join(steps)}",
                tensors=[path.name],
            )
        ]
    return [passed("weights", "tokenizer", f"the tokenizer is the run's own ({place})")]


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
