"""Everything a push needs before the network: which files, which card, and whether it may go."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.artifact.names import CARD_NAME, LEGAL, LOSS_PLOT, VERDICT
from moeconv.errors import OutputError, UsageError, to_install
from moeconv.hf.safetensors import read_header
from moeconv.hub.card import CardInput, card_body
from moeconv.hub.failures import Note
from moeconv.hub.gate import Judgement, demand, demand_verdict, judge
from moeconv.hub.local import File, Output, is_own, newest_output, read_own
from moeconv.hub.metadata import assemble, is_ours, join, make_metadata, renew
from moeconv.hub.plot import draw_losses, has_curve
from moeconv.hub.public import demand_sendable, machine_paths, public_files
from moeconv.verification.report.plots import PLOTS
from moeconv.verification.report.report import REPORT_NAME, Report


@dataclass(frozen=True)
class PushOptions:
    """See `moeconv push --help`.

    Attributes:
        repo_id: Where to; None for the repository that the run's config names.
        private: A repository that is made is private.
        revision: Branch.
        create_pr: Open a pull request, or go on with the one that is open.
        unverified: Push what is not proven to be the model.
        message: Of the commit.
        license: Of the model, over the run's own.
    """

    repo_id: str | None = None
    private: bool = False
    revision: str = "main"
    create_pr: bool = False
    unverified: bool = False
    message: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class PreparedPush:
    """What is to be sent.

    Attributes:
        output: What it was made of.
        judgement: What is known of it.
        repo_id: Where it goes.
        files: Everything but the card.
        metadata: The card's.
        body: The card's text, where the user wrote none.
        readme: The README in OUT, None where there is none.
        left_behind: Files in OUT that are not sent, and why.
        warnings: Of what is known without the Hub, a sentence each.
    """

    output: Output
    judgement: Judgement
    repo_id: str
    files: tuple[File, ...]
    metadata: Mapping[str, Any]
    body: str
    readme: str | None
    left_behind: Mapping[str, str]
    warnings: tuple[str, ...]

    def card(self, on_hub: str | None, override: tuple[str, ...] = ()) -> tuple[str, str]:
        """The README to be on the Hub, and whose it is.

        Args:
            on_hub: The one that is there.
            override: Metadata that the user gave on the command line.
        """
        if self.readme is not None and not is_ours(self.readme):
            where = str(self.output.folder / CARD_NAME)
            joined = join(self.readme, self.metadata, where=where, override=override)
            return joined, f"the text of {where}, with moeconv's metadata"
        if on_hub is not None and not is_ours(on_hub):
            where = f"the {CARD_NAME} of {self.repo_id}"
            joined = join(on_hub, self.metadata, where=where, override=override)
            return joined, f"the text of {where}, with moeconv's metadata"
        metadata = self.metadata
        if on_hub is not None:
            metadata = renew(on_hub, metadata, f"the {CARD_NAME} of {self.repo_id}")
        return assemble(metadata, self.body), "written by moeconv"


def find_output(out: Path | None, note: Callable[[str], None]) -> Path:
    """OUT, or the newest output below the current directory, said aloud.

    Raises:
        UsageError: There is none.
    """
    if out is not None:
        return out
    here = Path.cwd()
    found = newest_output(here)
    if found is None:
        raise UsageError(
            f"there is no output of moeconv convert below {here}; name it: moeconv push OUT"
        )
    note(f"OUT is {found}, the newest output of moeconv convert below {here}")
    return found


def prepare(out: Path, options: PushOptions, *, dry_run: bool, note: Note) -> PreparedPush:
    """Reads OUT and makes everything that is to be sent; sends nothing.

    Args:
        out: An output of `convert`.
        options: The user's.
        dry_run: What is not proven to be the model is reported, not refused.
        note: For people.

    Raises:
        MoeconvError: OUT is damaged, holds a secret, or has no destination; or, outside of
            a dry run, its report cannot prove it, which is said before gigabytes are read.
    """
    if options.create_pr and options.revision != "main":
        raise UsageError("--create-pr asks for a merge into main; leave out --revision")
    output = Output.open(out)
    if output.missing:
        raise OutputError(
            f"{out} lacks {', '.join(output.missing)}, which its manifest names; convert again"
        )
    repo_id = _repo_id(options, output)
    if not dry_run and not options.unverified:
        demand_verdict(output)
    numbers = _numbers(output)  # so that no file is hashed whose length is not its header's
    note(f"reading every byte of {out}")
    judgement = judge(output)
    if not dry_run and not options.unverified:
        demand(output, judgement)
    files = _files(output, judgement)
    license_id = options.license or _fact(output, "license")
    names = [file.name for file in files]
    card = CardInput(output, judgement, repo_id, options.revision, numbers, names, license_id)
    body = card_body(card)
    readme = _readme(out)
    metadata = make_metadata(output, judgement, name=repo_id.split("/")[-1], license_id=license_id)
    if readme is not None:
        demand_sendable([File.of(CARD_NAME, readme.encode(), out / CARD_NAME)])
    demand_sendable(files)
    message = File.of("the commit message", (options.message or "").encode())
    demand_sendable([message])
    if not dry_run:
        _demand_bound(output, judgement)
    left = {
        name: _why_left(name, output, judgement) for name in output.left_behind([*names, CARD_NAME])
    }
    return PreparedPush(
        output=output,
        judgement=judgement,
        repo_id=repo_id,
        files=tuple(files),
        metadata=metadata,
        body=body,
        readme=readme,
        left_behind=left,
        warnings=tuple(_warnings(output, files, judgement, left)),
    )


def _demand_bound(output: Output, judgement: Judgement) -> None:
    """Each file has the digest of the manifest or of the report.

    Raises:
        OutputError: Neither manifest nor report has the digest of one.
    """
    if output.changed and judgement.report is None:
        raise OutputError(
            f"{output.folder / output.changed[0]} is not as moeconv convert wrote it, and no "
            f"{REPORT_NAME} speaks of its bytes; nothing is sent, convert again"
        )


def _files(output: Output, judgement: Judgement) -> list[File]:
    """All but the card: the manifest's, and what the report is bound to by its digest."""
    report = judgement.report
    files = [output.files[name] for name in output.manifest.files]
    beside = _beside(output, report)
    files += public_files(output, report, [file.name for file in beside])
    files += beside
    if (plot := draw_losses(output.manifest.run)) is not None:
        files.append(File.of(LOSS_PLOT, plot))
    return files


def _beside(output: Output, report: Report | None) -> list[File]:
    """Plots, LICENSE and NOTICE, as far as the report is bound to their bytes.

    Raises:
        OutputError: One is a link, or cannot be read.
    """
    found = []
    for name in (*VERDICT, *LEGAL):
        there = is_own(output.folder, name)  # refuses a link, whether it would be sent or not
        if there and report is not None and name in report.beside:
            file = File.read(output.folder, name)
            if file.sha256 == report.beside[name]:
                found.append(file)
    return found


def _why_left(name: str, output: Output, judgement: Judgement) -> str:
    if name in (*VERDICT, *LEGAL) and output.report is not None and judgement.report is None:
        return f"{REPORT_NAME} is about other bytes than these"
    if name in (*PLOTS, *LEGAL):
        return f"no {REPORT_NAME} has its digest; run moeconv verify again"
    return "not in the manifest"


def _repo_id(options: PushOptions, output: Output) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id = options.repo_id or _fact(output, "hub_repo")
    if repo_id is None:
        raise UsageError(
            "no repository is named, neither by --repo-id nor by the run's config; pass "
            "--repo-id NAMESPACE/NAME"
        )
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("the namespace is missing")
    except HFValidationError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"{repo_id!r} is not a repository of the form NAMESPACE/NAME ({reason})"
        ) from None
    return repo_id


def _fact(output: Output, name: str) -> str | None:
    run = output.manifest.run
    value = getattr(run.facts, name) if run is not None and run.facts is not None else None
    return value if isinstance(value, str) and value else None


def _readme(out: Path) -> str | None:
    if not is_own(out, CARD_NAME):
        return None
    try:
        return read_own(out, CARD_NAME).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OutputError(
            f"{out / CARD_NAME} cannot be read as UTF-8 text ({error}); mend it"
        ) from None


def _numbers(output: Output) -> int:
    """Numbers in the safetensors files, from their headers."""
    weights = [name for name in output.manifest.files if name.endswith(".safetensors")]
    return sum(
        math.prod(spec.shape)
        for name in weights
        for spec, _ in read_header(output.folder / name).values()
    )


def _warnings(
    output: Output, files: list[File], judgement: Judgement, left: Mapping[str, str]
) -> list[str]:
    found = []
    for name in machine_paths(files, output):
        found.append(f"{name} names a folder of this machine; it is sent as it is")
    if output.changed:
        never = "; --unverified does not send them either" if judgement.report is None else ""
        found.append(f"not as moeconv convert wrote them: {', '.join(output.changed)}{never}")
    found += [
        f"{name} stays here: {why}"
        for name in (*PLOTS, *LEGAL)
        if (why := left.get(name)) is not None
    ]
    if not output.has_tokenizer:
        found.append("the output has no tokenizer; convert with --tokenizer to push one")
    if has_curve(output.manifest.run) and not any(file.name == LOSS_PLOT for file in files):
        found.append(
            "matplotlib is not installed, so the card has no plot of the losses; "
            + to_install("verify")
        )
    return found + [f"verify: {text}" for text in judgement.warnings]
