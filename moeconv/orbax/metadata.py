"""What `_METADATA` says: which leaves a checkpoint has and how they are stored."""

import json
from dataclasses import dataclass
from typing import Any

from moeconv.errors import NotACheckpointError
from moeconv.orbax.store import Folder

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """The leaves of a checkpoint and the storage format they share.

    Attributes:
        leaves: Key path of every leaf.
        use_ocdbt: Leaves lie in one OCDBT store instead of a folder each.
        use_zarr3: zarr v3, else v2.
        zeros_stored: Chunks of zeros are written too, so that an absent chunk is a damaged one.
    """

    leaves: tuple[KeyPath, ...]
    use_ocdbt: bool
    use_zarr3: bool
    zeros_stored: bool

    @property
    def parameters(self) -> tuple[KeyPath, ...]:
        """Key paths below `params.params`, the prefix left out."""
        return tuple(leaf[2:] for leaf in self.leaves if leaf[:2] == ("params", "params"))

    @property
    def is_train_state(self) -> bool:
        """Whether optimizer state lies beside the parameters."""
        return any(leaf[0] == "opt_state" for leaf in self.leaves)

    @property
    def others(self) -> tuple[str, ...]:
        """Top-level entries beside `params`, which conversion leaves alone on purpose."""
        return tuple(sorted({leaf[0] for leaf in self.leaves} - {"params"}))

    def describe(self) -> str:
        """The storage format for people."""
        return f"{'OCDBT + ' if self.use_ocdbt else ''}zarr{'3' if self.use_zarr3 else '2'}"


def read_tree(items: Folder) -> Tree:
    """Reads `_METADATA`.

    Key paths come from the key lists, never from splitting names on dots.

    Raises:
        NotACheckpointError: It is not readable as Orbax tree metadata, or holds no MaxText
            parameters.
    """
    raw = items.read("_METADATA")
    if raw is None:
        raise NotACheckpointError(f"{items} has no _METADATA, so it is no Orbax checkpoint")
    try:
        content: dict[str, Any] = json.loads(raw)
        entries = content["tree_metadata"].values()
        leaves = tuple(
            tuple(str(key["key"]) for key in entry["key_metadata"])
            for entry in entries
            if entry["key_metadata"] and not _is_empty(entry["value_metadata"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotACheckpointError(
            f"{items}/_METADATA is not the tree metadata that Orbax writes; the save is damaged"
        ) from None
    use_ocdbt = content.get("use_ocdbt")
    if use_ocdbt is None:
        use_ocdbt = items.read("manifest.ocdbt") is not None
    tree = Tree(
        tuple(sorted(leaves)),
        bool(use_ocdbt),
        bool(content.get("use_zarr3", False)),
        bool(content.get("store_array_data_equal_to_fill_value", False)),
    )
    if not tree.parameters:
        found = ", ".join(sorted({leaf[0] for leaf in leaves})) or "nothing"
        raise NotACheckpointError(
            f"{items} holds no parameters below params.params (it holds {found}), so it is no "
            "MaxText train state or parameters-only checkpoint"
        )
    return tree


def _is_empty(value: dict[str, Any]) -> bool:
    """Whether an entry is an empty container (a `None`, a `{}`), which has no array.

    The parameters-only checkpoints of MaxText 0.1.0 have `opt_state: {}` this way.
    """
    return bool(value.get("skip_deserialize")) or value.get("value_type") == "None"
