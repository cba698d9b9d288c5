"""A MaxText run that was made of a Hugging Face model, under verification.

The mapping is expanded for the checkpoint in OUT as if it were to be converted, and each tensor of
the source is taken back through it: what wrote the checkpoint walks the same edges turned round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from moeconv.arch.arrange import arranged
from moeconv.arch.layout import Layout
from moeconv.arch.model_keys import run_keys
from moeconv.arch.yaml_file import read_yaml
from moeconv.artifact.names import KNOWN, WRITING
from moeconv.conversion.described import Described, describe
from moeconv.conversion.incoming_tensors import as_text, demand_tensors
from moeconv.conversion.run_files import CONFIG_NAME, TOKENIZER
from moeconv.errors import MoeconvError, NotACheckpointError, UnsupportedError
from moeconv.execution.orbax_sink import STEP
from moeconv.hf.files import LocalFiles
from moeconv.hf.model import CONFIG, HfModel, Values, open_model
from moeconv.mapping.edges import Edge, cannot_hold, expand
from moeconv.maxtext.sidecar import SIDECAR_NAME
from moeconv.maxtext.whole import part_of
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.inventory import inventory
from moeconv.orbax.locate import Step, locate
from moeconv.orbax.metadata import read_tree
from moeconv.tensor.axes import Array
from moeconv.tensor.form import Form
from moeconv.tensor.stored import Source
from moeconv.untrusted.files import is_address, read_inside
from moeconv.verification.adapter import SourceGoneError
from moeconv.verification.boundary import blaming
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError
from moeconv.verification.stored import Stored

_FOLDERS = ("checkpoints", TOKENIZER, "models")


@dataclass(frozen=True)
class IncomingCandidate(Candidate):
    """OUT is the MaxText run; `source` is the Hugging Face model's folder.

    `arrays` are those of OUT, `tensors` those of the source, and `edges` say which of the source's
    tensors an array of OUT stands for.
    """

    kind: ClassVar[str] = "maxtext"
    config_name: ClassVar[str] = CONFIG_NAME
    origin: ClassVar[str] = "the Hugging Face model"
    # config.yml has none, and whether the source's two places agree is the source's affair.
    declared_ids: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open(cls, out: Path, *, source: str | None = None) -> Candidate:
        """As of a Hugging Face model; nothing in the whole tree may lead out of OUT."""
        inventory(out)
        return super().open(out, source=source)

    @staticmethod
    def may_hold(name: str) -> bool:
        """Returns True if convert writes a file of this name into a MaxText run."""
        path = PurePosixPath(name)
        if str(path) != name or ".." in path.parts or not name.isprintable():
            return False
        return name in (CONFIG_NAME, SIDECAR_NAME) or path.parts[0] in _FOLDERS

    def demand_description(self) -> None:
        """Raises whatever comes of a manifest that describes no model."""
        if self.manifest.source.kind != "huggingface":
            raise ValueError("a MaxText run is made of a Hugging Face model")
        if reason := cannot_hold(self.family, self.model):
            raise ValueError(reason)
        _ = self.count

    # --- OUT ------------------------------------------------------------------------------------

    @cached_property
    def step(self) -> Step:
        """The step in OUT.

        Raises:
            CandidateError: It is not there, or not complete.
        """
        with blaming(f"{self.out / STEP} is no checkpoint", check="tensors"):
            return locate(str(self.out / STEP))

    @cached_property
    def arrays(self) -> Arrays:
        """The arrays of OUT, opened.

        Raises:
            CandidateError: One cannot be.
        """
        with blaming(f"{self.out / STEP} cannot be read", check="tensors"):
            return Arrays(self.step.items, part_of(self.step, read_tree(self.step.items), "model"))

    @cached_property
    def read(self) -> Source:
        """The arrays of OUT."""
        return self.arrays

    @cached_property
    def layout(self) -> Layout:
        """How MaxText keeps the layers of the described model (arch/arrange.py).

        Few layers may be stacked nowhere although MaxText scans: then the step itself says so.

        Raises:
            CandidateError: It cannot keep them so.
        """
        axis = self.manifest.source.scan_axis
        scanned = axis is not None or self.step.scan_layers
        with blaming(f"{self.manifest_path} describes no MaxText model", check="config"):
            return arranged(
                self.block, self.model, scan_layers=scanned, scan_axis=1 if axis is None else axis
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.yml` as it is stored.

        Raises:
            CandidateError: It is no mapping, or not there.
        """
        path = self.out / CONFIG_NAME
        with blaming(f"{path} cannot be read as YAML", check="config"):
            content = read_yaml(read_inside(self.out, CONFIG_NAME).decode())
        if not isinstance(content, dict):
            raise CandidateError(f"{path} holds no settings", "config")
        return content

    @cached_property
    def wanted_config(self) -> dict[str, Any]:
        """config.yml as convert writes it for the described model."""
        layout = self.layout
        with blaming(f"{self.manifest_path} describes no MaxText model", check="config"):
            keys = run_keys(self.model, layout)
        return {"base_config": "base.yml", **{key: _plain(value) for key, value in keys.items()}}

    def token_id(self, name: str) -> Any:
        """An id of the described model: config.yml has none."""
        return _plain(getattr(self.model, name))

    @property
    def tokenizer_folder(self) -> Path:
        """Where convert puts it."""
        return self.out / TOKENIZER

    @property
    def entries(self) -> set[str]:
        """The names of all files in OUT, those of a folder that people may add by the folder's."""
        names = {name: name.partition("/")[0] for name in inventory(self.out)}
        tops = {name: top for name, top in names.items() if not top.startswith(WRITING)}
        return {top if top in KNOWN else name for name, top in tops.items()}

    def demand_arrays(self) -> None:
        """The arrays are those of the described model, which MaxText builds in this layout.

        Raises:
            CandidateError: Names those that are not.
        """
        wanted = {a.name: (a.parameter.variable or "params", a.shape) for a in self.layout.arrays}
        kinds = {leaf.name: leaf.collection for leaf in self.arrays.tree.model}
        found = {name: (kinds[name], info.shape) for name, info in self.arrays.info.items()}
        problems = [f"{name} (missing)" for name in sorted(wanted.keys() - found.keys())]
        problems += [f"{name} (unexpected)" for name in sorted(found.keys() - wanted.keys())]
        problems += [
            f"{name} {' '.join(map(str, found[name]))} for {' '.join(map(str, wanted[name]))}"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ]
        if self.step.scan_layers != self.layout.stacking.scanned:
            problems.append(f"_CHECKPOINT_METADATA: scan_layers is {self.step.scan_layers}")
        if problems:
            raise CandidateError(
                f"{len(problems)} arrays of {self.out / STEP} are not the described model's: "
                + "; ".join(problems[:10]),
                "tensors",
            )

    # --- the source -----------------------------------------------------------------------------

    @cached_property
    def hf(self) -> HfModel:
        """The source: its config, and the headers of its files.

        Raises:
            NotACheckpointError: The one that the user named is not there.
            SourceGoneError: The one that only the manifest names is not on this machine.
            UnsupportedError: It is quantised.
        """
        named = f"{self.manifest_path} names"
        if is_address(self.source):
            raise SourceGoneError(
                f"{self.source}, which {named}, is at an address; download it, and give the folder "
                "with --source"
            )
        try:
            found, _ = as_text(open_model(LocalFiles(self.folder)))
        except NotACheckpointError as error:
            if self.given is not None:
                raise
            raise SourceGoneError(
                f"{error} (the model that {named}; --source gives another, and level structure "
                "needs none)"
            ) from None
        if (quantised := found.config.get("quantization_config")) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise UnsupportedError(
                f"{self.source} is quantised by {method}, and only level structure judges what was "
                "made of such a model; convert OUT back, and compare that with the model that "
                "transformers dequantises"
            )
        return found

    @cached_property
    def beside(self) -> Mapping[str, str]:
        """What a multimodal source has beside its text model."""
        return as_text(open_model(LocalFiles(self.folder)))[1]

    @property
    def folder(self) -> Path:
        """Where the source is."""
        return Path(self.source).expanduser()

    @cached_property
    def described(self) -> Described:
        """What the source's own config.json says, read as for a conversion.

        Raises:
            MoeconvError: It is no model that converts.
        """
        return describe(
            self.hf.config,
            f"{self.hf.name}/{CONFIG}",
            block=self.model.decoder_block,
            accept=self.manifest.accepted_keys,
            peek=Values(self.hf),
        )

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """The source's tensors that are not left out."""
        left_out = self.manifest.dropped
        return {
            name: Stored(one.spec, self.folder / one.file, one.offset)
            for name, one in self.hf.tensors.items()
            if name not in left_out
        }

    @cached_property
    def forward(self) -> tuple[Edge, ...]:
        """What the arrays of OUT become as a Hugging Face model.

        Raises:
            CandidateError: The arrays, or the source's tensors, are not the described model's.
        """
        self.demand_count()
        self.demand_arrays()
        dtypes = {name: info.dtype for name, info in self.arrays.info.items()}
        what = f"the model that {self.manifest_path} describes is not that of {self.out / STEP}"
        with blaming(what, check="tensors"):
            return expand(self.family, self.model, self.layout, dtypes, options=self.options)

    @cached_property
    def edges(self) -> Mapping[str, Edge]:
        """The same, of the dtypes that the source's tensors have."""
        hf, described = self.hf, self.described
        what = f"{self.source} is not the model that {self.manifest_path} describes"
        with blaming(what, check="tensors"):
            try:
                dropped = demand_tensors(hf, self.forward, described, self.beside)
            except MoeconvError as error:
                raise CandidateError(f"{what}: {error}", "tensors") from None
            if dropped.keys() != self.manifest.dropped.keys():
                apart = sorted(dropped.keys() ^ self.manifest.dropped.keys())
                raise CandidateError(
                    f"{what}: the manifest and the source differ in what is left out, "
                    f"{', '.join(apart[:5])}",
                    "tensors",
                )
            return {
                e.target: _of_dtype(e, self.hf.tensors[e.target].spec.dtype) for e in self.forward
            }

    def wrong(self, form: Form, block: Array, piece: Array, others: Sequence[Array]) -> Array:
        """Where OUT's array is not what the source's tensor becomes when it is taken back."""
        return form.wrong_back(block, piece)

    def is_exact(self, edge: Edge) -> bool:
        """True if taking the source's tensor back rounds nothing."""
        return all(value.inverse(value.target).bound() == 0.0 for value in edge.values)


def _of_dtype(edge: Edge, dtype: str) -> Edge:
    """The edge, its tensor in another dtype."""
    parts = tuple(
        replace(
            part,
            form=replace(
                part.form, value=part.form.value.inverse(dtype).inverse(part.form.value.source)
            ),
        )
        for part in edge.parts
    )
    return replace(edge, dtype=dtype, parts=parts)


def _plain(value: Any) -> Any:
    """A value as YAML and JSON have it."""
    return list(value) if isinstance(value, tuple) else value
