"""What converts, as a value: every decoder block that a page converts or refuses."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeconv.families import blocks, refused, targets
from moeconv.printing import Printable

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Goal:
    """A target of a decoder block.

    Attributes:
        name: Value of `--target`.
        architecture: Class in transformers.
        transformers: The oldest release that loads what is written.
    """

    name: str
    architecture: str
    transformers: str


@dataclass(frozen=True)
class Row:
    """A decoder block of MaxText, or a variant of one.

    Attributes:
        decoder_block: Value of the setting.
        variant: The setting that makes it a variant, which is refused; None for the block itself.
        layers: What its layers are; empty where it is refused.
        maxtext: The first release of MaxText from which it converts; of a refused block, the first
            that has it. None for a variant, and where the page does not say.
        status: `converts` or `refused`.
        reason: Why it is refused; None where it converts.
        targets: What it becomes, the default first; none where it is refused.
        hf_to_maxtext: The architectures that become it.
    """

    decoder_block: str
    variant: str | None
    layers: str
    maxtext: str | None
    status: str
    reason: str | None
    targets: tuple[Goal, ...]
    hf_to_maxtext: tuple[str, ...] = ()


@dataclass(frozen=True)
class Families(Printable):
    """Every row, those that convert first."""

    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv families --json` prints."""
        return {"families": [asdict(row) for row in self.rows]}

    def parts(self) -> "Iterator[RenderableType]":
        """What `moeconv families` prints."""
        from rich.table import Table

        table = Table(title="converts", title_justify="left", box=None, pad_edge=False)
        for heading in ("decoder_block", "MaxText", "becomes", "transformers", "back", "layers"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            if row.status == "converts":
                becomes = "\n".join(goal.architecture for goal in row.targets)
                since = "\n".join(f"≥ {goal.transformers}" for goal in row.targets)
                release = f"≥ {row.maxtext}" if row.maxtext else ""
                back = "\n".join(
                    "✓" if goal.architecture in row.hf_to_maxtext else "—" for goal in row.targets
                )
                table.add_row(row.decoder_block, release, becomes, since, back, row.layers)
        yield table
        yield ""
        table = Table(title="refused", title_justify="left", box=None, pad_edge=False)
        for heading in ("decoder_block", "why"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            if row.status == "refused":
                name = f"{row.decoder_block}, {row.variant}" if row.variant else row.decoder_block
                table.add_row(name, row.reason)
        yield table
        yield ""
        yield "back: from Hugging Face to MaxText, which `moeconv convert` does as well"


def families() -> Families:
    """The table, of all pages.

    Raises:
        ConfigError: An installed page cannot be used.
    """
    known = targets()
    converts = [
        Row(
            block.name,
            None,
            block.note,
            block.since,
            "converts",
            None,
            tuple(
                Goal(name, known[name].architecture, known[name].since) for name in block.targets
            ),
            tuple(
                known[name].architecture
                for name in block.targets
                if (reading := known[name].reading) is not None and block.name not in reading.unmade
            ),
        )
        for block in blocks().values()
    ]
    variants = [
        Row(block.name, setting, "", None, "refused", f"it {reason}", ())
        for block in blocks().values()
        for setting, reason in block.refuses.items()
    ]
    whole = [
        Row(each.name, None, "", each.since, "refused", each.reason, ())
        for each in refused().values()
    ]
    return Families((*converts, *variants, *whole))
