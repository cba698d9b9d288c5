"""What `_METADATA` says: which leaves a checkpoint has and how they are stored."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from moeconv.errors import NotACheckpointError, TensorError, UnsupportedError
from moeconv.orbax.store import Folder
from moeconv.untrusted import strict_json

KeyPath = tuple[str, ...]

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
        return tuple(leaf[2:] for leaf in self.leaves if _is_parameter(leaf))

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
        TensorError: There are leaves that are neither parameters nor the state of a training.
        UnsupportedError: Among them are biases of a router.
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
            f"{items}/_METADATA names {twice[0]} twice, so which array it is cannot be told"
        )
    use_ocdbt = content.get("use_ocdbt")
    if use_ocdbt is None:
        use_ocdbt = items.has("manifest.ocdbt")
    tree = Tree(
        tuple(leaves),
        bool(use_ocdbt),
        bool(content.get("use_zarr3", False)),
        bool(content.get("store_array_data_equal_to_fill_value", False)),
    )
    if not tree.parameters:
        found = ", ".join(sorted({leaf[0] for leaf in leaves})[:20]) or "nothing"
        raise NotACheckpointError(
            f"{items} holds no parameters below params.params (it holds {found}), so it is no "
            "MaxText train state or parameters-only checkpoint"
        )
    _refuse_strangers(items, leaves)
    return tree


def _refuse_strangers(items: Folder, leaves: list[KeyPath]) -> None:
    """Leaves that may belong to the model are never passed over."""
    strangers = [
        ".".join(leaf) for leaf in leaves if not (_is_parameter(leaf) or is_of_training(leaf))
    ]
    if not strangers:
        return
    more = f"\n  … and {len(strangers) - 20} more" if strangers[20:] else ""
    names = "".join(f"\n  {name}" for name in strangers[:20]) + more
    # `MoEBiasVar` (MaxText layers/moe.py): in `params` of MaxText's converter, in `nnx_aux` of a
    # train state (common/train_state_nnx.py `split_for_checkpoint`).
    if any("MoEBiasVar" in name or name.endswith("gate.bias") for name in strangers):
        raise UnsupportedError(
            f"{items} keeps biases of a router outside of params.params, which no supported target "
            f"has:{names}"
        )
    raise TensorError(
        f"{items} holds arrays outside of params.params that are neither an optimizer's nor random "
        f"state, so converting it might drop a part of the model:{names}"
    )


def _is_parameter(leaf: KeyPath) -> bool:
    return leaf[:2] == ("params", "params") and len(leaf) > 2


def is_of_training(leaf: KeyPath) -> bool:
    """True if it is of a train state, and the model's function does not depend on it.

    Random state is the key or the counter of a stream (flax `nnx/rnglib.py`, `RngStream`).
    """
    if leaf[0] == "nnx_aux":
        return "rngs" in leaf[-3:-1] and leaf[-1] in ("key", "count")
    return leaf[0] == "opt_state" or leaf == ("step",)


def _key(key: Any) -> str:
    """One key of a path; ValueError where it can be none."""
    text = str(key) if type(key) is int else key
    if not (isinstance(text, str) and _KEY.match(text)):
        raise ValueError
    return text


def _is_empty(value: dict[str, Any]) -> bool:
    """Whether an entry is an empty container (a `None`, a `{}`), which has no array.

    The parameters-only checkpoints of MaxText 0.1.0 have `opt_state: {}` this way.
    """
    return value.get("value_type") in _EMPTY
