"""What a conversion refuses: NaN and Inf, of the checkpoint and of a cast that overflows."""

from collections.abc import Sequence

from moeconv.errors import TensorError
from moeconv.planning.units import Route
from moeconv.tensor.axes import Array
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import count_nonfinite
from moeconv.tensor.stored import ArrayInfo
from moeconv.untrusted.text import listing


def check_finite(array: Array, dtype: str, what: str) -> None:
    """Refuses NaN and Inf.

    Raises:
        TensorError: Names what holds them.
    """
    if any(count_nonfinite(array, dtype)):
        raise TensorError(what)


def check_companions(companions: Sequence[Companion], others: Sequence[Array]) -> None:
    """Refuses NaN and Inf in what is read beside a block, before they are taken for an overflow.

    Raises:
        TensorError: Names the companion.
    """
    for companion, other in zip(companions, others, strict=True):
        check_finite(other, other.dtype.name, nonfinite_message(companion.source, ""))


def check_overflow(
    source: Array,
    info: ArrayInfo,
    values: Array,
    route: Route,
    others: Sequence[Array] = (),
    *,
    copied: bool,
) -> None:
    """Refuses numbers that became Inf in the target's dtype.

    Args:
        source: The block as read.
        info: Its array.
        values: What was made of it.
        route: Where it goes.
        others: What was read beside the block.
        copied: NaN and Inf of the source are allowed, so that only new ones count.

    Raises:
        TensorError: Names the parameter and the tensors.
    """
    dtype = route.edges[0].dtype
    found = sum(count_nonfinite(values, dtype)) if copied else any(count_nonfinite(values, dtype))
    if copied and any(any(count_nonfinite(other, other.dtype.name)) for other in others):
        return  # each stands for many values, of which none is a number
    if found and not (copied and found == sum(count_nonfinite(source, info.dtype))):
        targets = listing([edge.target for edge in route.edges])
        raise TensorError(
            f"values of parameter {info.name} overflow {dtype}; convert with --dtype bfloat16 or "
            f"float32. Tensors:{targets}"
        )


def nonfinite_message(source: str, where: str) -> str:
    """The sentence for a NaN or Inf in the checkpoint."""
    return (
        f"parameter {source} holds NaN or Inf{where}; the run diverged or overflowed. Convert an "
        "earlier step, or pass --allow-nonfinite to copy the values as they are"
    )
