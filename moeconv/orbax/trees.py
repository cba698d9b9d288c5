"""Which arrays of a checkpoint are the model's, whatever tree MaxText saved them in.

The model's tree begins at one of `ROOTS`:

    params.params    MaxText's own, of train states and of parameters only (Linen, and NNX since
                     0.2.4: common/train_state_nnx.py `to_checkpoint_dict`)
    params           the same without a collection (checkpoint_conversion/utils/utils.py
                     `detect_and_extract_checkpoint`, "single params layer")
    base, model      an NNX state of RL, and a whole NNX train state
    (the top)        an NNX state of fine-tuning (training_engine/checkpointing.py)

Beside `params.params` a model may have variables of other classes: in a Flax collection of that
name below `params`, or, in a train state, in `nnx_aux.model`. An NNX state has all in one place.

Names are those of MaxText's Linen models: `layers.0` is `layers_0`, and the `value` in which an NNX
variable ends is left out (utils.py `param_key_parts_from_path`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

KeyPath = tuple[str, ...]

ROOTS: tuple[KeyPath, ...] = (("params", "params"), ("params",), ("base",), ("model",), ())
# What every MaxText model has (models/models.py).
_MODULES = ("decoder", "token_embedder")
_NUMBER = re.compile(r"[0-9]{1,9}\Z")

# Collections: of parameters, of a train state's other variables, and of a tree without any.
PARAMS, AUX, UNTOLD = "params", "nnx_aux", ""


@dataclass(frozen=True)
class Leaf:
    """One array of the model.

    Attributes:
        stored: Its key path in the checkpoint.
        path: Its key path in the model, e.g. `("decoder", "layers_0", "mlp", "wo", "kernel")`.
        collection: `PARAMS`, `AUX` (`nnx_aux`), `UNTOLD` where an NNX state keeps none apart, or
            the name of another Flax collection below `params` (MaxText's class of variable).
    """

    stored: KeyPath
    path: KeyPath
    collection: str

    @property
    def name(self) -> str:
        """Dotted `path`."""
        return ".".join(self.path)

    @property
    def stored_name(self) -> str:
        """Dotted `stored`, which is also the array's name in the store."""
        return ".".join(self.stored)


# `kernel_lora_a` beside `kernel` (qwix), `lora_a.kernel` (utils/lora_utils.py).
_ADAPTER = re.compile(r"(?:.*_)?lora_[ab](?:\..*)?\Z")


def is_adapter(path: KeyPath) -> bool:
    """True for a matrix of a LoRA adapter."""
    keys = path[:-1] if path[-1] == "value" else path
    return any(_ADAPTER.match(key) for key in keys[-2:])


def root_of(leaves: Sequence[KeyPath]) -> KeyPath | None:
    """Where the model's tree begins: the first of `ROOTS` that there is; None if there is none."""
    for root in ROOTS:
        below = {leaf[len(root)] for leaf in leaves if leaf[: len(root)] == root != leaf}
        if below and (root == ROOTS[0] or below.intersection(_MODULES)):
            return root
    return None


def roots_elsewhere(leaves: Sequence[KeyPath], root: KeyPath | None) -> list[KeyPath]:
    """Where a tree with both of `_MODULES` begins, if nothing of a model is at the root.

    Args:
        leaves: Those of the checkpoint.
        root: From `root_of`.
    """
    found: dict[KeyPath, set[str]] = {}
    for leaf in leaves:
        place = next((n for n, key in enumerate(leaf[:-1]) if key in _MODULES), None)
        if place is not None and not is_of_training(leaf):
            found.setdefault(leaf[:place], set()).add(leaf[place])
    if root in found:
        return []
    return [each for each, keys in sorted(found.items()) if len(keys) == len(_MODULES)]


def leaf_of(stored: KeyPath, root: KeyPath) -> Leaf | None:
    """The array of the model at a key path; None if nothing of the model is stored there.

    Args:
        stored: Its key path, of no leaf that `is_of_training`.
        root: From `root_of`.
    """
    if root == ROOTS[0] and stored[:2] == ("nnx_aux", "model") and len(stored) > 2:
        return Leaf(stored, model_path(stored[2:]), AUX)
    if root == ROOTS[0] and stored[0] == "params" and len(stored) > 2:
        return Leaf(stored, model_path(stored[2:]), stored[1])
    if root != ROOTS[0] and stored[: len(root)] == root != stored:
        return Leaf(stored, model_path(stored[len(root) :]), PARAMS if root else UNTOLD)
    return None


def model_path(stored: KeyPath) -> KeyPath:
    """A key path below the root as MaxText's Linen models have it."""
    parts: list[str] = []
    for key in stored:
        if _NUMBER.match(key) and parts:
            parts[-1] = f"{parts[-1]}_{key}"
        else:
            parts.append(key)
    return tuple(parts[:-1] if parts[-1] == "value" and len(parts) > 1 else parts)


def is_random(leaf: KeyPath) -> bool:
    """True for the key or the counter of a random stream (flax `nnx/rnglib.py`, `RngStream`)."""
    plain = leaf[:-1] if leaf[-1] == "value" else leaf
    holds = any(key == "rngs" or key.endswith("_rngs") for key in plain[-3:-1])
    return holds and plain[-1] in ("key", "count")


def is_of_training(leaf: KeyPath) -> bool:
    """True if it is of a training's state, and the model's function does not depend on it.

    `inner_state` and `outer_opt_state` are DiLoCo's, whose model is in `params.params`
    (trainers/diloco/utils/spmd_diloco_checkpointing.py `to_diloco_checkpoint_dict`).
    """
    if leaf[0] == "inner_state":
        return leaf[1:2] == ("params",) or (len(leaf) > 1 and is_of_training(leaf[1:]))
    return (
        leaf[0] in ("opt_state", "optimizer", "outer_opt_state")
        or leaf in (("step",), ("step", "value"))
        or (leaf[0] != "params" and is_random(leaf))
    )
