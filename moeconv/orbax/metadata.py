"""What `_METADATA` says: which leaves a checkpoint has and how they are stored."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from moeconv.errors import NotACheckpointError, TensorError
from moeconv.orbax.database import MANIFEST, parts_of
from moeconv.orbax.store import Folder
from moeconv.orbax.trees import (
    PARAMS,
    KeyPath,
    Leaf,
    is_adapter,
    is_of_training,
    leaf_of,
    root_of,
    roots_elsewhere,
)
from moeconv.untrusted import strict_json

# Runs write some thousand.
_MOST_LEAVES = 100_000
# A key is part of a file's name. Flax builds it of Python names, and Linen's transforms of those,
# with parentheses; optimizers number theirs.
_KEY = re.compile(r"(?!\.{1,2}\Z)[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,200}\Z")
# Containers without a leaf (orbax-checkpoint `metadata/empty_values.py`).
_EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")


@dataclass(frozen=True)
class Tree:
    """The leaves of a checkpoint and the storage format they share.

    Attributes:
        leaves: Key path of every leaf.
        root: Where the model's tree begins, one of `trees.ROOTS`.
        model: The arrays of the model, no two of one name.
        superseded: Arrays of `params.params` that another collection has as well; MaxText takes
            that one's (common/checkpointing.py `load_params_from_path`).
        use_ocdbt: Leaves are stored in one OCDBT store instead of a folder each.
        use_zarr3: zarr v3, else v2.
        zeros_stored: Chunks of zeros are written too, so that an absent chunk is a damaged one.
    """

    leaves: tuple[KeyPath, ...]
    root: KeyPath
    model: tuple[Leaf, ...]
    superseded: tuple[Leaf, ...]
    use_ocdbt: bool
    use_zarr3: bool
    zeros_stored: bool

    @property
    def adapters(self) -> tuple[Leaf, ...]:
        """Those of `model` that are matrices of a LoRA adapter."""
        return tuple(leaf for leaf in self.model if is_adapter(leaf.path))

    @property
    def left_adapters(self) -> int:
        """How many such matrices are beside `model`, where it was chosen without them."""
        found = [leaf for leaf in self.leaves if is_adapter(leaf) and not is_of_training(leaf)]
        return len(found) - len(self.adapters)

    @property
    def collections(self) -> dict[KeyPath, str]:
        """The collection of every array that is not among the parameters, by `Leaf.path`."""
        return {leaf.path: leaf.collection for leaf in self.model if leaf.collection != PARAMS}

    @property
    def is_train_state(self) -> bool:
        """Returns True if optimizer state is stored with the parameters."""
        return any(leaf[0] in ("opt_state", "optimizer") for leaf in self.leaves)

    @property
    def others(self) -> tuple[str, ...]:
        """Top-level entries without an array of the model, left alone on purpose."""
        used = {leaf.stored[0] for leaf in (*self.model, *self.superseded)}
        return tuple(sorted({leaf[0] for leaf in self.leaves} - used))

    def describe(self) -> str:
        """The storage format for people."""
        return f"{'OCDBT + ' if self.use_ocdbt else ''}zarr{'3' if self.use_zarr3 else '2'}"


def read_tree(items: Folder) -> Tree:
    """Reads `_METADATA`.

    Key paths come from the key lists, never from splitting names on dots.

    Raises:
        NotACheckpointError: It is not readable as Orbax tree metadata, or holds no MaxText
            parameters.
        TensorError: There are leaves that are neither of a model nor the state of a training.
    """
    raw = items.read("_METADATA")
    if raw is None:
        raise NotACheckpointError(f"{items} has no _METADATA, so it is no Orbax checkpoint")
    try:
        content: dict[str, Any] = strict_json.loads(raw)
        entries = content["tree_metadata"].values()
        if len(entries) > _MOST_LEAVES:
            raise NotACheckpointError(
                f"{items}/_METADATA names {len(entries)} arrays; no run writes more than "
                f"{_MOST_LEAVES}"
            )
        leaves = sorted(
            tuple(_key(key["key"]) for key in entry["key_metadata"])
            for entry in entries
            if not _is_empty(entry["value_metadata"])
        )
        if () in leaves:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotACheckpointError(
            f"{items}/_METADATA is not the tree metadata that Orbax writes; the save is damaged"
        ) from None
    twice = [name for name, n in Counter(".".join(leaf) for leaf in leaves).items() if n > 1]
    if twice:
        raise NotACheckpointError(
            f"{items}/_METADATA names {twice[0]} twice, so it is unclear which array it is"
        )
    use_ocdbt = content.get("use_ocdbt")
    if use_ocdbt is None:
        use_ocdbt = items.has(MANIFEST) or any(True for _ in parts_of(items))
    root = root_of(leaves)
    if others := roots_elsewhere(leaves, root):
        listed = " and ".join(".".join(each) for each in others[:3])
        raise NotACheckpointError(
            f"{items} holds a model below {listed}, where no MaxText saves one; save it anew with "
            "its tree at params.params"
        )
    if root is None:
        found = ", ".join(sorted({leaf[0] for leaf in leaves})[:20]) or "nothing"
        raise NotACheckpointError(
            f"{items} holds no parameters of a MaxText model (it holds {found}): none below "
            "params.params, and no decoder or token_embedder below params, base, model or at the "
            "top"
        )
    model, superseded = _model(items, leaves, root)
    return Tree(
        tuple(leaves),
        root,
        model,
        superseded,
        bool(use_ocdbt),
        bool(content.get("use_zarr3", False)),
        bool(content.get("store_array_data_equal_to_fill_value", False)),
    )


def _model(
    items: Folder, leaves: list[KeyPath], root: KeyPath
) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    """The arrays of the model; leaves that may belong to it are never passed over."""
    found: dict[KeyPath, list[Leaf]] = {}
    others = []
    for stored in leaves:
        if is_of_training(stored):
            continue
        if (leaf := leaf_of(stored, root)) is None:
            others.append(".".join(stored))
        else:
            found.setdefault(leaf.path, []).append(leaf)
    if others:
        raise outside(items, root, others)
    superseded = []
    for same in found.values():
        own = [leaf for leaf in same if leaf.collection == PARAMS]
        if len(same) == 2 and len(own) == 1:
            superseded += own
            same.remove(own[0])
        elif len(same) > 1:
            names = " and ".join(leaf.stored_name for leaf in same)
            raise NotACheckpointError(
                f"{items}/_METADATA names one parameter as {names}, so it is unclear which array "
                "it is"
            )
    return tuple(same[0] for same in found.values()), tuple(superseded)


def outside(items: Folder, root: KeyPath, names: list[str]) -> TensorError:
    """Arrays that may belong to the model, and that nothing here would read."""
    more = f"\n  … and {len(names) - 20} more" if names[20:] else ""
    listed = "".join(f"\n  {name}" for name in names[:20]) + more
    return TensorError(
        f"{items} holds arrays outside of {'.'.join(root) or 'decoder and token_embedder'} that "
        "are neither an optimizer's nor random state, so converting it might drop a part of the "
        f"model:{listed}"
    )


def _key(key: Any) -> str:
    """One key of a path; ValueError where it can be none."""
    text = str(key) if type(key) is int else key
    if not (isinstance(text, str) and _KEY.match(text)):
        raise ValueError
    return text


def _is_empty(value: dict[str, Any]) -> bool:
    """Returns True if an entry is an empty container (a `None`, a `{}`), which has no array.

    The parameters-only checkpoints of MaxText 0.1.0 have `opt_state: {}` this way.
    """
    return value.get("value_type") in _EMPTY
