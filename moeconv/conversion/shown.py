"""A planned conversion as data, and as lines and tables for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moeconv.printing import fold
from moeconv.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeconv.conversion.api import Prepared


def describe_plan(prepared: "Prepared") -> dict[str, Any]:
    """The plan as data."""
    plan, options = prepared.plan, prepared.options
    tensors = [
        {
            "name": edge.target,
            "shape": list(edge.shape),
            "dtype": edge.dtype,
            "sources": [part.source.name for part in edge.parts],
            "ops": edge.steps(),
            "summary": edge.describe(),
            "error_bound": edge.bound(),
            "file": plan.files[plan.places[name].file].name,
            "offset": plan.places[name].offset,
            "bytes": edge.nbytes,
        }
        for name, edge in plan.edges.items()
    ]
    return {
        "target": plan.family.name,
        "architecture": plan.family.architecture,
        "digest": plan.digest,
        "tensors": tensors,
        "files": [{"name": f.name, "bytes": f.layout.size} for f in plan.files],
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "disk_bytes": plan.disk_bytes,
        "memory_floor": plan.memory_floor,
        "memory_budget": plan.memory_budget(options.max_memory, options.jobs),
        "units": len(plan.units),
        "warnings": list(plan.warnings),
        "dropped": dict(plan.dropped),
    }


def plan_parts(prepared: "Prepared") -> "Iterator[RenderableType]":
    """The plan for people."""
    from rich.table import Table

    report = describe_plan(prepared)
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "from", "by", "exact"):
        table.add_column(heading, overflow="fold")
    rows = []
    for tensor in report["tensors"]:
        bound = tensor["error_bound"]
        exact = "yes" if bound == 0 else f"within {bound:.1g}"
        sources = " + ".join(tensor["sources"]) or "—"
        rest = (str(tensor["shape"]), tensor["dtype"], sources, tensor["summary"])
        rows.append((tensor["name"], (*rest, exact)))
    for name, line, _ in fold(rows):
        table.add_row(name, *line)
    yield f"{report['architecture']}, {len(report['tensors'])} tensors"
    yield table
    yield ""
    for file in report["files"]:
        yield f"{file['name']}  {format_size(file['bytes'])}"
    yield (
        f"reads {format_size(report['read_bytes'])} in {report['units']} units, writes "
        f"{format_size(report['write_bytes'])}; disk {format_size(report['disk_bytes'])}"
        + (f" (scratch {format_size(report['scratch_bytes'])})" if report["scratch_bytes"] else "")
    )
    yield (
        f"memory: at most {format_size(report['memory_budget'])}, at least "
        f"{format_size(report['memory_floor'])}"
    )
