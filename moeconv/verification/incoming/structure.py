"""Level `structure` of a MaxText run: files, arrays, config and sidecar, without the source.

The tree of arrays is compared with the one that the page's layout has, and with the one that
MaxText itself builds from config.yml, as shapes only.
"""

import importlib.util
from collections.abc import Callable, Mapping

from moeconv.arch.defaults import TOKEN_IDS
from moeconv.arch.yaml_file import read_yaml
from moeconv.conversion.run_files import CONFIG_NAME
from moeconv.maxtext.checkpoint import find_sidecar
from moeconv.planning.units import UNIT_BYTES, Unit, unit_boxes
from moeconv.tensor.dtypes import count_nonfinite
from moeconv.untrusted.files import read_inside
from moeconv.verification.boundary import blaming
from moeconv.verification.checks import CandidateError, Check, CheckFactory
from moeconv.verification.incoming.candidate import IncomingCandidate
from moeconv.verification.levels import Level
from moeconv.verification.levels.structure import check_files
from moeconv.verification.levels.tokenizers import check_tokenizer
from moeconv.verification.models.maxtext import built_tree
from moeconv.verification.models.reference import reference_config

_OF = CheckFactory(Level.STRUCTURE)


def check_structure(candidate: IncomingCandidate) -> list[Check]:
    """Every check that needs nothing but the output directory.

    Raises:
        MachineError: This machine cannot read a file.
        MemoryLimitError: It has too little memory.
    """
    checks = []
    for name, check in _CHECKS.items():
        try:
            with blaming(f"{candidate.out}: check {name} cannot be made", check=name):
                checks.append(check(candidate))
        except CandidateError as error:
            failed = name if error.check == "model" else error.check
            if not any(c.name == failed for c in checks):  # it is said already
                checks.append(_OF.failed(failed, str(error)))
            elif failed != name:
                checks.append(_OF.skipped(name, f"not made, since check {failed} failed"))
    return checks


def _tensors(candidate: IncomingCandidate) -> Check:
    """The arrays, their shapes and collections, against the page's layout."""
    candidate.demand_arrays()
    count, layout = len(candidate.arrays.info), candidate.layout.describe()
    return _OF.passed("tensors", f"{count} arrays, as the described model has them, {layout}")


def _dtypes(candidate: IncomingCandidate) -> Check:
    """What the manifest says is what the arrays have; with `keep` it names the commonest."""
    claimed, sizes = candidate.manifest.dtype, dict[str, int]()
    for info in candidate.arrays.info.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    most = max(sorted(sizes), key=sizes.__getitem__, default=None)  # as convert chooses
    if most == claimed and (candidate.manifest.dtype_kept or len(sizes) == 1):
        return _OF.passed("dtypes", f"arrays are {' and '.join(sorted(sizes))}, as was asked for")
    other = [name for name, info in candidate.arrays.info.items() if info.dtype != claimed]
    return _OF.failed("dtypes", f"{len(other)} arrays are not {claimed}", tensors=other)


def _finite(candidate: IncomingCandidate) -> Check:
    """No NaN or Inf."""
    wrong = []
    for info in candidate.arrays.info.values():
        for box in unit_boxes(info, (), UNIT_BYTES):
            reader = candidate.arrays.reader(info.name, Unit(info, box, 0).chunk_count)
            values = reader.read(tuple(slice(*ends) for ends in box))
            if any(count_nonfinite(values, info.dtype)):
                wrong.append(info.name)
                break
    if wrong:
        return _OF.failed("finite", f"{len(wrong)} arrays hold NaN or Inf", tensors=wrong)
    return _OF.passed("finite", "all values are finite")


def _config(candidate: IncomingCandidate) -> Check:
    """config.yml key by key, and the model that a conversion back reads from the sidecar."""
    wrong, wanted, found = candidate.wrong_keys, candidate.wanted_config, candidate.config
    if wrong:
        return _OF.failed(
            "config",
            f"{CONFIG_NAME} differs from the described model in: {', '.join(wrong[:20])}",
            metrics={key: [wanted.get(key), found.get(key)] for key in wrong[:20]},
        )
    if (other := _foreign(candidate)) is not None:
        return _OF.failed("config", other)
    sidecar = find_sidecar(candidate.step, needed=True)
    if sidecar is None:
        return _OF.failed("config", "there is no sidecar, which the way back is read from")
    own = reference_config(
        candidate.model, candidate.layout_of(candidate.arrays), candidate.step, None
    ).resolution.model()
    ours, theirs = candidate.model.values(), own.values()
    apart = sorted(
        key
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key) and not (key in TOKEN_IDS and theirs.get(key) is None)
    )
    if sidecar.content.target != candidate.manifest.target:
        apart.append("target")
    if apart:
        return _OF.failed(
            "config",
            f"the run's sidecar is another model's in: {', '.join(apart)}",
            metrics={key: [ours.get(key), theirs.get(key)] for key in apart},
        )
    summary = f"{len(wanted)} settings of {CONFIG_NAME}, and the sidecar, are the described model's"
    if accepted := candidate.manifest.accepted_keys:
        return _OF.warned(
            "config",
            f"{summary}; but the source's config has keys that moeconv does not know, and that the "
            f"conversion accepted: {', '.join(accepted)}",
        )
    return _OF.passed("config", summary)


def demand_loadable(candidate: IncomingCandidate) -> None:
    """What MaxText is given is what the manifest describes, in its config and its arrays.

    Raises:
        CandidateError: It is not.
    """
    if candidate.wrong_keys:
        raise CandidateError(
            f"{CONFIG_NAME} differs from the described model in: {', '.join(candidate.wrong_keys)}",
            "config",
        )
    candidate.demand_arrays()
    if (found := _foreign(candidate)) is not None:
        raise CandidateError(found, "config")


def _foreign(candidate: IncomingCandidate) -> str | None:
    """A file that MaxText reads settings from beside config.yml, and that has some.

    configs/pyconfig.py `_initialize_pydantic` looks for models/NAME.yml and base.yml there.
    """
    for path in (candidate.out / "base.yml", *sorted(candidate.out.glob("models/*"))):
        if path.exists() and _has_settings(candidate, str(path.relative_to(candidate.out))):
            return f"{path} has settings, which MaxText takes instead of those of {CONFIG_NAME}"
    return None


def _has_settings(candidate: IncomingCandidate, name: str) -> bool:
    with blaming(f"{candidate.out / name} cannot be read", check="config"):
        return bool(read_yaml(read_inside(candidate.out, name).decode()))


def _maxtext(candidate: IncomingCandidate) -> Check:
    """Names and shapes against the model that MaxText builds from config.yml, read by itself."""
    if importlib.util.find_spec("maxtext") is None:
        return _OF.skipped("maxtext", "maxtext is not installed (moeconv[train])")
    try:
        demand_loadable(candidate)
    except CandidateError as error:  # so what it would build may be anything, of any size
        return _OF.skipped("maxtext", f"not asked, since {error}")
    with blaming(f"MaxText cannot build a model from {candidate.out / CONFIG_NAME}"):
        version, wanted = built_tree(candidate.out / CONFIG_NAME)
    found = {name: info.shape for name, info in candidate.arrays.info.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        return _OF.failed(
            "maxtext",
            f"MaxText {version} builds another model from {CONFIG_NAME}: {len(wrong)} arrays "
            "differ",
            tensors=[f"{n} {found.get(n)} for {wanted.get(n)}" for n in wrong],
        )
    return _OF.passed("maxtext", f"MaxText {version} builds exactly these {len(found)} arrays")


_CHECKS: Mapping[str, Callable[[IncomingCandidate], Check]] = {
    "files": check_files,
    "tensors": _tensors,
    "dtypes": _dtypes,
    "finite": _finite,
    "config": _config,
    "maxtext": _maxtext,
    "tokenizer": check_tokenizer,
}
