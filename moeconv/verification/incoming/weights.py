"""Level `weights` of a MaxText run: every value of it against the source's tensors."""

from moeconv.conversion.incoming import views_of
from moeconv.errors import TokenizerError
from moeconv.execution.digest import array_digest, chunk_digests
from moeconv.hf.model import Tensors
from moeconv.hf.tokenizer import read_tokenizer
from moeconv.mapping.reverse import reverse
from moeconv.maxtext.checkpoint import find_sidecar
from moeconv.planning.units import Unit, cut_into_units, routes_of
from moeconv.tensor.dtypes import SIGNIFICAND_BITS
from moeconv.verification.boundary import blaming
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.incoming.candidate import IncomingCandidate
from moeconv.verification.levels import Level
from moeconv.verification.levels.tokenizers import same_tokenizer
from moeconv.verification.levels.weights import (
    compare_all,
    each_unit,
    mismatch,
    source_bytes,
    source_check,
    values_check,
)
from moeconv.verification.settings import Progress

_OF = CheckFactory(Level.WEIGHTS)


def check_weights(candidate: IncomingCandidate, run: Verification) -> list[Check]:
    """Compares the description, every value, and the tokenizer, with the source.

    Raises:
        CandidateError: OUT cannot be read, or the source is of another model.
        MoeconvError: The source is not there, or cannot be read.
    """
    described = _description(candidate)
    if (wrong := mismatch(candidate)) is not None:
        return [described, wrong]
    jobs, memory = run.options.jobs, run.options.memory
    # Each value is read twice: from OUT to be compared, from the source for its digest.
    with run.meter(2 * source_bytes(candidate)) as progress:
        findings = compare_all(candidate, jobs=jobs, memory=memory, progress=progress)
        digests = _digests(candidate, jobs, memory, progress)
    return [
        described,
        source_check(candidate, digests),
        values_check(candidate, findings),
        *_tokenizer(candidate),
    ]


def _description(candidate: IncomingCandidate) -> Check:
    """The model that the source's config.json describes is the manifest's, field by field."""
    _ = candidate.hf  # or there is no verdict
    with blaming(f"{candidate.source} is not a model that converts", check="description"):
        theirs = candidate.described.model.values()
    ours = candidate.model.values()
    apart = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if apart:
        said = "; ".join(f"{k} is {ours.get(k)}, not {theirs.get(k)}" for k in apart[:10])
        return _OF.failed("description", f"OUT is another model than its source: {said}")
    if wrong := _wrongly_narrowed(candidate):
        return _OF.failed(
            "description",
            "the run's sidecar has other dtypes than the source for the way back",
            tensors=wrong,
        )
    return _OF.passed("description", f"{len(ours)} fields are those of the source's config.json")


def _wrongly_narrowed(candidate: IncomingCandidate) -> list[str]:
    """Arrays that are wider than their tensors, and of which the sidecar does not say so."""
    sidecar = find_sidecar(candidate.step, needed=False)
    said = sidecar.content.narrowed if sidecar is not None else {}
    found: dict[str, set[str]] = {}
    for edge in candidate.edges.values():
        if not candidate.family.rules[edge.rule].shared and edge.is_first_copy:
            for part in edge.parts:
                found.setdefault(part.source, set()).add(edge.dtype)
    wanted = {
        name: next(iter(dtypes))
        for name, dtypes in found.items()
        if len(dtypes) == 1
        and all(_is_narrower(each, candidate.arrays.info[name].dtype) for each in dtypes)
    }
    return sorted(n for n in wanted.keys() | said.keys() if wanted.get(n) != said.get(n))


def _is_narrower(one: str, other: str) -> bool:
    return SIGNIFICAND_BITS[one] < SIGNIFICAND_BITS[other]


def _digests(
    candidate: IncomingCandidate, jobs: int, memory: int, progress: Progress
) -> dict[str, str]:
    """Digests of the source's tensors, in the pieces that the conversion read."""
    stored = {name: one.spec.dtype for name, one in candidate.hf.tensors.items()}
    back, origins = reverse(candidate.forward, candidate.family, candidate.layout, stored)
    source = Tensors(candidate.hf, views_of(back, origins, candidate.arrays.info))
    chunks: dict[str, dict[tuple[int, ...], str]] = {}

    def work(unit: Unit) -> None:
        digests = chunk_digests(unit, source.reader(unit.array.name, unit.chunk_count))
        chunks.setdefault(unit.array.name, {}).update(digests)  # one step each: no lock is needed
        progress(unit.nbytes)

    units = cut_into_units(routes_of(back), source.info)
    each_unit(units, work, jobs=jobs, memory=memory)
    return {
        name: array_digest(info.dtype, info.shape, info.chunk, chunks[name])
        for name, info in source.info.items()
    }


def _tokenizer(candidate: IncomingCandidate) -> list[Check]:
    """The tokenizer is the source's own, if it has one."""
    length = candidate.model.max_position_embeddings
    try:
        own = read_tokenizer(str(candidate.folder), model_max_length=length)
    except TokenizerError:
        return []
    return [same_tokenizer(candidate, own)]
