"""A Mixture of Experts of transformers whose experts are loaded and computed in groups.

The block is transformers' own, of the whole config, so that it routes over all experts; in the
place of its experts is `grouped_experts`. A group is transformers' own class of experts, of a model
with as many, filled by `from_pretrained` from the tensors of these.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from moeconv.errors import UnsupportedError
from moeconv.verification.models.expert_groups import Groups
from moeconv.verification.models.transformers_tensors import ReadTensor

# What configs call the number of experts.
_NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Of the tensors of one expert.
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def groups_of(block: Any) -> Groups | None:
    """How the experts of a feed-forward half are taken; None for all at once, or for no experts.

    Args:
        block: On the meta device.

    Raises:
        UnsupportedError: They do not fit, and are not called with the experts of each token.
    """
    experts = getattr(block, "experts", None)
    count = getattr(experts, "num_experts", None)
    if experts is None or not isinstance(count, int):
        return None
    groups = Groups.of(count, sum(value.numel() for value in experts.parameters()))
    # hidden states [N, D], then indices and weights [N, k]
    if groups is not None and len(inspect.signature(type(experts).forward).parameters) != 4:
        raise UnsupportedError(
            f"the experts of a {type(block).__name__} do not fit into memory, and transformers "
            "has no way to compute some of them"
        )
    return groups


def with_experts(config: Any, count: int) -> Any:
    """The config of a model with so many experts."""
    config = copy.deepcopy(config)
    for name in _NUMBERS:
        if hasattr(config, name):
            setattr(config, name, count)
    return config


def slice_of(
    tensors: Mapping[str, ReadTensor], whole: Any, part: Any, experts: slice
) -> dict[str, Any]:
    """The tensors of a layer, of its experts only those of a group, numbered from 0.

    Args:
        tensors: What gives each tensor, by its stored name.
        whole: The feed-forward half on the meta device.
        part: The same with as many experts as the group has.
        experts: The group.
    """
    shapes = {name: value.shape for name, value in part.state_dict().items()}
    sliced = [name for name, value in whole.state_dict().items() if value.shape != shapes[name]]
    found = {}
    for name, read in tensors.items():
        if number := _EXPERT.search(name):
            if (index := int(number[1])) in range(experts.start, experts.stop):
                start, end = number.span(1)
                found[f"{name[:start]}{index - experts.start}{name[end:]}"] = read(None)
        else:
            found[name] = read(experts if name.endswith(tuple(f".{n}" for n in sliced)) else None)
    return found


def grouped_block(whole: Any, part: Any, stored: Mapping[str, ReadTensor], experts: Any) -> Any:
    """The feed-forward half of the whole config, filled, with its experts in groups.

    Args:
        whole: On the meta device.
        part: Of one group, filled.
        stored: What gives each tensor of the layer, by its stored name.
        experts: The experts.

    Raises:
        UnsupportedError: A tensor of it is not stored by its own name.
    """
    block, own = copy.deepcopy(whole), part.state_dict()
    block.experts = experts
    filled = {}
    for name, value in block.state_dict().items():
        if own[name].shape == value.shape:
            filled[name] = own[name]
            continue
        named = [read for stored_as, read in stored.items() if stored_as.endswith(f".{name}")]
        if len(named) != 1:
            raise UnsupportedError(f"{name} of a {type(block).__name__} is not stored as such")
        filled[name] = named[0](None).to(own[name].dtype)
    block.load_state_dict(filled, assign=True)
    return block.eval()


def _module() -> type[Any]:
    import torch

    class Experts(torch.nn.Module):  # type: ignore[misc]
        """Experts of which one group at a time is in memory."""

        def __init__(self, groups: Groups, load: Callable[[slice], Any]) -> None:
            super().__init__()
            self._groups, self._load = groups, load
            self.num_experts = groups.count

        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            """As transformers' experts: [N, D], [N, k] and [N, k] give [N, D]."""
            total = torch.zeros_like(hidden)
            for experts in self._groups:
                token, place = torch.where((index >= experts.start) & (index < experts.stop))
                found = self._load(experts)(
                    hidden[token],
                    index[token, place, None] - experts.start,
                    weights[token, place, None],
                )
                total.index_add_(0, token, found.to(total.dtype))
            return total

    return Experts


def grouped_experts(groups: Groups, load: Callable[[slice], Any]) -> Any:
    """A module in the place of transformers' experts.

    Args:
        groups: Of the experts.
        load: Gives transformers' own experts of a slice.
    """
    return _module()(groups, load)
