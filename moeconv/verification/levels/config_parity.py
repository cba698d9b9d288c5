"""Check `description`: the output's description against the run's own config, field by field.

Some fields of a model move logits by less than rounding does: an epsilon of 1e-6 for 1e-5, or the
length of the context. Where the run's config is there, they are compared and not measured.
"""

from typing import Any

from moeconv.arch.defaults import TOKEN_IDS
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.fields import FIELDS, YARN
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Check, CheckFactory, Status
from moeconv.verification.models.reference import ReferenceConfig

# Logits do not depend on them.
_ASIDE = {"max_position_embeddings", *TOKEN_IDS}


def check_config_parity(
    of: CheckFactory, candidate: Candidate, config: ReferenceConfig
) -> list[Check]:
    """Every field of the manifest's description against what the run's config gives.

    A difference fails. It warns where logits do not depend on the field, and where a flag of the
    conversion set what the config leaves to MaxText's default: the run may have set it too.

    Returns:
        One check; none where only the manifest describes the model.

    Raises:
        MoeconvError: The config is not of this checkpoint's model.
    """
    if not config.independent:
        return []
    found = config.resolution
    ours, theirs = candidate.model, found.model()
    # What only one of both has follows from another field, which differs too.
    specs = (*FIELDS, *YARN)
    follows = {f.name for f in specs if f.needed(vars(ours)) != f.needed(vars(theirs))}
    run = {**theirs.values(), **config.unsaid}
    differing: dict[Status, list[str]] = {Status.FAIL: [], Status.WARN: []}
    metrics: dict[str, Any] = {}
    for name, value in ours.values().items():
        if name in follows or run[name] == value or (name in TOKEN_IDS and run[name] is None):
            continue
        record, source = candidate.manifest.model.get(name), found.sources.get(name)
        by = (record and record.source) or "no source"
        flag = by.startswith(f"{Origin.FLAG}: ") or name == "decoder_block"
        status = Status.WARN if name in _ASIDE or (flag and _is_default(source)) else Status.FAIL
        differing[status].append(
            f"{name} is {value} in the output ({by}), but {run[name]} in the run ({source})"
        )
        metrics[name] = {"output": [value, by], "run": [run[name], str(source)]}
    if not metrics:
        summary = f"all {len(run)} fields of the output's description are the run's"
        return [of.passed("description", summary)]
    status = Status.FAIL if differing[Status.FAIL] else Status.WARN
    summary = "; ".join(differing[Status.FAIL] + differing[Status.WARN])
    return [of.graded(status, "description", summary, metrics=metrics)]


def _is_default(source: Provenance | None) -> bool:
    return source is not None and source.origin is Origin.DEFAULT
