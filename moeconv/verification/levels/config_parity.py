"""Check `description`: what the conversion was told against the run's own config, field by field.

Some of what makes a model moves logits by less than rounding does: an epsilon of 1e-6 for 1e-5, or
the length of the context. Where the run's config is at hand nobody needs to measure that.
"""

from typing import Any

from moeconv.arch.description import Origin, Provenance
from moeconv.arch.fields import FIELDS, YARN
from moeconv.arch.told import TOKEN_IDS
from moeconv.verification.candidate import Subject
from moeconv.verification.checks import Check, Level, Status, passed
from moeconv.verification.models.reference import ReferenceConfig

# Logits do not depend on them.
_ASIDE = {"max_position_embeddings", *TOKEN_IDS}


def check_description(level: Level, subject: Subject, config: ReferenceConfig) -> list[Check]:
    """Every field of the manifest's description against what the run's config gives.

    A difference fails. It warns where logits do not depend on the field, and where the conversion
    was told by a flag what the config leaves to MaxText's default: so may the run have been.

    Returns:
        One check; none where only the manifest tells of the model.

    Raises:
        MoeconvError: The config is not of this checkpoint's model.
    """
    if not config.independent:
        return []
    found = config.resolution
    ours, theirs = subject.model, found.model()
    # What only one of both has follows from another field, which differs too.
    specs = (*FIELDS, *YARN)
    follows = {f.name for f in specs if f.needed(vars(ours)) != f.needed(vars(theirs))}
    run = {**theirs.values(), **config.unsaid}
    differing: dict[Status, list[str]] = {Status.FAIL: [], Status.WARN: []}
    metrics: dict[str, Any] = {}
    for name, value in ours.values().items():
        if name in follows or run[name] == value or (name in TOKEN_IDS and run[name] is None):
            continue
        record, told = subject.manifest.model.get(name), found.sources.get(name)
        by = (record and record.source) or "nobody"
        flag = by.startswith(f"{Origin.FLAG}: ") or name == "decoder_block"
        status = Status.WARN if name in _ASIDE or (flag and _is_default(told)) else Status.FAIL
        differing[status].append(
            f"{name} is {value} in the output ({by}), but {run[name]} in the run ({told})"
        )
        metrics[name] = {"output": [value, by], "run": [run[name], str(told)]}
    if not metrics:
        summary = f"all {len(run)} fields of the output's description are the run's"
        return [passed(level, "description", summary)]
    return [
        Check(
            level=level,
            name="description",
            status=Status.FAIL if differing[Status.FAIL] else Status.WARN,
            summary="; ".join(differing[Status.FAIL] + differing[Status.WARN]),
            metrics=metrics,
        )
    ]


def _is_default(told: Provenance | None) -> bool:
    return told is not None and told.origin is Origin.DEFAULT
