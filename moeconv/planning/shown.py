"""A plan as lines and tables for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeconv.printing import fold
from moeconv.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeconv.planning.plan import Plan


_SHOWN = 2  # tensors of one array that are named


def plan_parts(plan: "Plan") -> "Iterator[RenderableType]":
    """The plan for people."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "from", "by", "exact"):
        table.add_column(heading, overflow="fold")
    rows = []
    for edge in plan.edges.values():
        bound = edge.bound()
        exact = "yes" if bound == 0 else f"within {bound:.1g}"
        few = edge.sources[:_SHOWN] if len(edge.sources) > _SHOWN + 1 else edge.sources
        more = len(edge.sources) - len(few)
        sources = " + ".join([*few, *([f"{more} more"] if more else [])]) or "—"
        rest = (str(list(edge.shape)), edge.dtype, sources, edge.describe())
        rows.append((edge.target, (*rest, exact)))
    for name, line, _ in fold(rows):
        table.add_row(name, *line)
    yield f"{plan.page.architecture}, {len(plan.edges)} tensors"
    yield table
    yield ""
    for name, size in plan.output.sizes.items():
        yield f"{name}  {format_size(size)}"
    estimate = plan.estimate
    scratch = f" (scratch {format_size(estimate.scratch_bytes)})" if estimate.scratch_bytes else ""
    if plan.source.path.startswith("hf://"):
        yield f"downloads {format_size(estimate.read_bytes)} of {plan.source.path}"
    yield (
        f"reads {format_size(estimate.read_bytes)} in {len(plan.units)} units, writes "
        f"{format_size(estimate.write_bytes)}; disk {format_size(estimate.disk_bytes)}{scratch}"
    )
    yield (
        f"memory: at most {format_size(plan.memory_budget)}, at least "
        f"{format_size(estimate.memory_floor)}"
    )
