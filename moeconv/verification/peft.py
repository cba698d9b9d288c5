"""A LoRA adapter for PEFT under verification: what of it can be compared, and with what.

Its tensors are the adapter checkpoint's, by the rules of the base model, of which the structure
alone is read. An adapter is no model, so nothing is run: that is for the merged one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from moeconv.arch.layout import Layout
from moeconv.artifact.manifest import AdapterRecord
from moeconv.artifact.names import CARD_NAME
from moeconv.conversion.adapter_files import adapter_config
from moeconv.errors import TensorError, UnsupportedError
from moeconv.mapping.edges import Edge, expand
from moeconv.mapping.lora import EXPERT, Targeted, peft_edges, targeted
from moeconv.maxtext.fused import take_apart
from moeconv.maxtext.lora import Strength
from moeconv.maxtext.whole import part_of
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.metadata import read_tree
from moeconv.planning.adapter import CONFIG_NAME, WEIGHTS_NAME, changes_of
from moeconv.tensor.stored import Source
from moeconv.verification.adapter import other_checkpoint
from moeconv.verification.boundary import blaming
from moeconv.verification.candidate import Candidate, OtherKindError
from moeconv.verification.checks import CandidateError, Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.files import read_object
from moeconv.verification.levels import LEVELS, Level
from moeconv.verification.levels.structure import check_files, check_finite
from moeconv.verification.levels.weights import check_weights, source_bytes

_STRUCTURE, _WEIGHTS = CheckFactory(Level.STRUCTURE), CheckFactory(Level.WEIGHTS)
_START, _ENDS = "base_model.model.", {".lora_A.weight": 0, ".lora_B.weight": 1}


@dataclass(frozen=True)
class PeftCandidate(Candidate):
    """An adapter that convert made; `source` is the checkpoint that its training saved."""

    kind: ClassVar[str] = "peft"

    @staticmethod
    def may_hold(name: str) -> bool:
        """Returns True if convert writes a file of this name for an adapter."""
        return name in (CARD_NAME, CONFIG_NAME, WEIGHTS_NAME)

    def demand_description(self) -> None:
        """As of a model, and of the adapter."""
        super().demand_description()
        _ = self.record

    @property
    def record(self) -> AdapterRecord:
        """What the manifest says of it."""
        record = self.manifest.adapter
        if record is None or record.merged or record.rank < 1:
            raise ValueError("a manifest of an adapter has its rank")
        return record

    @property
    def strength(self) -> Strength:
        """Its rank and alpha, as the manifest has them."""
        return Strength(self.record.rank, self.record.alpha, self.record.alpha_source)

    @cached_property
    def arrays(self) -> Arrays:
        """The adapter's factors, opened."""
        tree = part_of(self.step, read_tree(self.step.items), "adapter")
        return Arrays(self.step.items, tree, allow_missing=bool(self.manifest.missing_chunks))

    @cached_property
    def read(self) -> Source:
        """All arrays that the output was made from."""
        return self.arrays

    @cached_property
    def base(self) -> Arrays:
        """The arrays of the model that was adapted, opened; no value of them is read.

        Raises:
            SourceGoneError: It is not on this machine.
        """
        step = other_checkpoint(self.record, self.manifest_path, "base")
        arrays = Arrays(step.items, part_of(step, read_tree(step.items), "model alone"))
        take_apart(arrays)
        return arrays

    @cached_property
    def layout(self) -> Layout:
        """How the base keeps its layers."""
        return self.layout_of(self.base)

    @cached_property
    def _expected(self) -> tuple[tuple[Edge, ...], Targeted]:
        """The tensors, and what PEFT is to change."""
        what = f"the model that {self.manifest_path} describes is not that of the base"
        layout, model, factors = self.layout, self.model, self.arrays.info
        experts = {n for a in layout.arrays for x, n in zip(a.axes, a.shape, strict=True)
                   if x == EXPERT}  # fmt: skip
        # What is expanded takes time by these, and anybody can write 10^9 there.
        if len(model.layer_kinds) != len(layout.kinds) or experts - {model.num_experts}:
            raise CandidateError(f"{what}: it has other layers or experts", "tensors")
        dtype = None if self.manifest.dtype_kept else self.manifest.dtype
        with blaming(what, check="tensors"):
            try:
                dtypes = {name: info.dtype for name, info in self.base.info.items()}
                base = expand(self.family, model, layout, dtypes)
                changes = changes_of(layout, factors)
                adapted = peft_edges(base, self.family, changes, dtype=dtype)
                return adapted, targeted(base, adapted, self.family)
            except (TensorError, UnsupportedError) as error:
                raise CandidateError(f"{what}: {error}", "tensors") from None

    @cached_property
    def edges(self) -> Mapping[str, Edge]:
        """What every tensor should be, by name; raises as those of a model do."""
        return {edge.target: edge for edge in self._expected[0]}

    @cached_property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json` as it is stored.

        Raises:
            CandidateError: It is no JSON object, or not there.
        """
        return read_object(self.out / CONFIG_NAME)

    @property
    def trained_config(self) -> dict[str, Any]:
        """The same as convert writes it for these checkpoints."""
        return adapter_config(self.strength, self.record.base_model, self._expected[1])

    @cached_property
    def modules(self) -> dict[str, list[tuple[int, ...] | None]]:
        """The shapes of A and B, by the name of the linear layer that they change."""
        found: dict[str, list[tuple[int, ...] | None]] = {}
        for name, stored in self.tensors.items():
            for end, side in _ENDS.items():
                if name.startswith(_START) and name.endswith(end):
                    module = name.removeprefix(_START).removesuffix(end)
                    found.setdefault(module, [None, None])[side] = stored.spec.shape
        return found


def open_candidate(out: Path, source: str | None) -> Candidate:
    """Reads OUT's manifest, of a model or of an adapter.

    Raises:
        MoeconvError: As `Candidate.open`.
    """
    try:
        return Candidate.open(out, source=source)
    except OtherKindError:
        return PeftCandidate.open(out, source=source)


def check_adapter(candidate: PeftCandidate, level: Level, run: Verification) -> list[Check]:
    """One level of an adapter.

    Raises:
        UnsupportedError: The level runs models.
        MoeconvError: Something that is needed is missing or cannot be read.
    """
    if LEVELS[level].runs_models:
        raise UnsupportedError(
            f"level {level} compares running models, and {candidate.out} is an adapter of one; "
            "convert the base with --merge-lora, and verify that: it is the same sum"
        )
    if level is Level.STRUCTURE:
        return list(_structure(candidate))
    if wrong := _other_keys(candidate.trained_config, candidate.config):
        return [_WEIGHTS.failed("config", f"{CONFIG_NAME} is another adapter's in: {wrong}")]
    with run.meter(source_bytes(candidate)) as progress:
        options = run.options
        return check_weights(candidate, jobs=options.jobs, memory=options.memory, progress=progress)


def _structure(candidate: PeftCandidate) -> Iterator[Check]:
    checks = {"files": check_files, "tensors": _tensors, "dtypes": _dtypes,
              "finite": check_finite, "config": _config}  # fmt: skip
    for name, check in checks.items():
        try:
            with blaming(f"{candidate.out}: check {name} cannot be made", check=name):
                found = check(candidate)
        except CandidateError as error:
            found = _STRUCTURE.failed(name, str(error))
        yield found


def _tensors(candidate: PeftCandidate) -> Check:
    """One file, and of each layer that is changed the two matrices, of the manifest's rank."""
    rank, files = candidate.record.rank, {s.file.name for s in candidate.tensors.values()}
    if files != {WEIGHTS_NAME}:
        return _STRUCTURE.failed("tensors", f"PEFT reads {WEIGHTS_NAME} alone", tensors=[*files])
    wrong = [
        module
        for module, (a, b) in candidate.modules.items()
        if a is None or b is None or len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank)
    ]
    others = len(candidate.tensors) - sum(map(len, candidate.modules.values()))
    if wrong or others:
        return _STRUCTURE.failed(
            "tensors",
            f"{len(wrong)} layers have not two matrices of rank {rank}, and the names of "
            f"{abs(others)} tensors are not those of an adapter",
            tensors=wrong,
        )
    return _STRUCTURE.passed(
        "tensors", f"two matrices of rank {rank} for each of {len(candidate.modules)} linear layers"
    )


def _dtypes(candidate: PeftCandidate) -> Check:
    """What the manifest says is what the tensors have."""
    claimed = candidate.manifest.dtype
    found = {stored.spec.dtype for stored in candidate.tensors.values()}
    if claimed in found and (candidate.manifest.dtype_kept or len(found) == 1):
        return _STRUCTURE.passed("dtypes", f"tensors are {claimed}, as the manifest says")
    other = [n for n, stored in candidate.tensors.items() if stored.spec.dtype != claimed]
    return _STRUCTURE.failed("dtypes", f"tensors are not {claimed}", tensors=other)


def _config(candidate: PeftCandidate) -> Check:
    """`adapter_config.json`: the manifest's rank and alpha, for exactly the layers in the file."""
    found, record = candidate.config, candidate.record
    named = [found.get(key) or [] for key in ("target_modules", "target_parameters")]
    modules, parameters = (
        tuple(each) if isinstance(each, list) and all(isinstance(n, str) for n in each) else ()
        for each in named
    )
    meant = Targeted(modules, parameters)
    if wrong := _other_keys(adapter_config(candidate.strength, record.base_model, meant), found):
        return _STRUCTURE.failed("config", f"{CONFIG_NAME} differs from the manifest in: {wrong}")
    # How PEFT takes names: moeconv/mapping/lora.py, `Targeted`.
    ways = {
        module: {
            *(n for n in modules if module == n or module.endswith(f".{n}")),
            *(n for n in parameters if n == f"{module}.weight"),
        }
        for module in candidate.modules
    }
    missed = sorted(module for module, names in ways.items() if not names)
    idle = sorted({*modules, *parameters}.difference(*ways.values()))
    if missed or idle:
        return _STRUCTURE.failed(
            "config",
            f"{CONFIG_NAME} leaves out {len(missed)} layers that have matrices, and names "
            f"{len(idle)} that have none",
            tensors=missed + idle,
        )
    return _STRUCTURE.passed(
        "config", f"{CONFIG_NAME} has the manifest's rank and alpha, and names these layers"
    )


def _other_keys(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Keys that differ, for people."""
    keys = sorted(wanted.keys() | found.keys())
    return ", ".join(key for key in keys if wanted.get(key) != found.get(key))
