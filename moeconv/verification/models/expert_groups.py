"""The experts of a layer in groups, where all of them at once are more than memory should hold."""

from collections.abc import Iterator
from dataclasses import dataclass

# float32 weights of the experts that are held at once. Computing with a group takes about thrice
# that: MaxText's and transformers' matmuls lay operands out anew.
EXPERT_BYTES = 2 << 30


@dataclass(frozen=True)
class Groups:
    """Equal groups of consecutive experts.

    Attributes:
        count: Experts of the layer.
        size: Experts of a group; it divides `count`.
    """

    count: int
    size: int

    @classmethod
    def of(cls, count: int, values: int) -> "Groups | None":
        """The fewest groups of which each fits; None where all experts fit together.

        Args:
            count: Experts of the layer.
            values: Weights of all of them together.
        """
        if values * 4 <= EXPERT_BYTES:
            return None
        most = EXPERT_BYTES * count // (values * 4)
        return cls(count, max((n for n in range(1, most + 1) if count % n == 0), default=1))

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, start + self.size) for start in range(0, self.count, self.size))
