"""Checks that a source is still the one that was read: no model is made of a mixture of two."""

from collections.abc import Callable, Mapping

from moeconv.errors import TensorError

Look = Callable[[], Mapping[str, object]]


class Unchanged:
    """Looks at what is read before that, and again afterwards."""

    def __init__(self) -> None:
        self._seen: list[tuple[Look, Mapping[str, object]]] = []

    def watch(self, look: Look) -> None:
        """Takes the first look.

        Args:
            look: Names of things that are read, each with what changes when it does; cheap.
        """
        self._seen.append((look, look()))

    def check(self) -> None:
        """Takes the second look.

        Raises:
            TensorError: Something changed; names it.
        """
        changed = set()
        for look, then in self._seen:
            now = look()
            changed |= {name for name in {*then, *now} if then.get(name) != now.get(name)}
        if changed:
            first = ", ".join(sorted(changed)[:3])
            more = f" and {len(changed) - 3} more" if changed - set(sorted(changed)[:3]) else ""
            raise TensorError(
                f"the source was written to while it was converted ({first}{more}), so that the "
                "model would be a mixture; convert again when no process writes to it"
            )
