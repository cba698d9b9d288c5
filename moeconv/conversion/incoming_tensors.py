"""The tensors of a Hugging Face model that is read: all that its page has, and what is left out."""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeconv.conversion.described import Described, text_model
from moeconv.errors import TensorError, UnsupportedError
from moeconv.hf.model import CONFIG, HfModel, Tensors, View
from moeconv.mapping.edges import Edge
from moeconv.mapping.reading import MULTIMODAL
from moeconv.tensor.dtypes import DTYPES
from moeconv.untrusted.text import listing

# Buffers that older transformers saved, and computes anew.
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.self_attn\.(bias|masked_bias)")


def left_out(dropped: Mapping[str, str]) -> list[str]:
    """A sentence for each reason."""
    why: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        why.setdefault(reason, []).append(name)
    return [
        f"{len(names)} tensors are left out, {names[0]} first: {reason}"
        if len(names) > 1
        else f"{names[0]} is left out: {reason}"
        for reason, names in why.items()
    ]


def as_text(hf: HfModel) -> tuple[HfModel, Mapping[str, str]]:
    """The text model of a multimodal one, and what else that has, as `Reading.left_out`."""
    config, whole = text_model(hf.config, f"{hf.name}/{CONFIG}")
    if whole is None:
        return hf, {}
    tensors = {}
    for name, stored in hf.tensors.items():
        begins = next((text for text in MULTIMODAL if name.startswith(text)), None)
        own = name if begins is None else MULTIMODAL[begins] + name.removeprefix(begins)
        tensors[own] = replace(stored, spec=replace(stored.spec, name=own))
    return replace(hf, config=config, tensors=tensors), whole.left_out


def demand_tensors(
    hf: HfModel, forward: tuple[Edge, ...], found: Described, beside: Mapping[str, str]
) -> dict[str, str]:
    """Compares the tensors of a model with those of its page; those left out, with the reason.

    Args:
        hf: The model.
        forward: How the page's tensors are made.
        found: What config.json says.
        beside: What a multimodal model has besides, as `Reading.left_out`.

    Raises:
        TensorError: One is missing, unknown, or of another shape.
    """
    reading = found.page.reading
    assert reading is not None
    wanted = {edge.target: edge for edge in forward}
    dropped: dict[str, str] = {}
    unknown = []
    for name in sorted(hf.tensors.keys() - wanted.keys()):
        left_out = {**beside, **reading.left_out}
        reasons = (why for text, why in left_out.items() if re.match(text, name))
        if name == "lm_head.weight" and found.model.tie_word_embeddings:
            dropped[name] = "tie_word_embeddings is true, and transformers ties it to the embedding"
        elif _BUFFERS.fullmatch(name):
            dropped[name] = "transformers computes it anew"
        elif (layer := re.match(r"model\.layers\.(\d+)\.", name)) and int(
            layer[1]
        ) >= found.model.num_hidden_layers:
            dropped[name] = (
                "it is of a layer behind the last, which predicts further tokens; the main logits "
                "do not use it"
            )
        elif (reason := next(reasons, None)) is not None:
            dropped[name] = reason
        else:
            unknown.append(name)
    if lost := [name for name in wanted if name not in hf.tensors]:
        raise TensorError(
            f"{hf.name} lacks these tensors of a {found.page.architecture}:{listing(lost)}"
        )
    if unknown:
        raise TensorError(
            f"{hf.name} has tensors that a {found.page.architecture} does not have, so that "
            f"leaving them out would change the model:{listing(unknown)}"
        )
    for name, edge in wanted.items():
        shape, dtype = hf.tensors[name].spec.shape, hf.tensors[name].spec.dtype
        if dtype not in DTYPES and hf.tensors[name].scales is None:
            raise UnsupportedError(
                f"{hf.tensors[name].file}: {name} is stored as {dtype}, and {CONFIG} does not say "
                f"how it is quantised; moeconv reads {', '.join(DTYPES)}"
            )
        if shape != edge.shape:
            raise TensorError(
                f"{hf.name}/{hf.tensors[name].file}: {name} has shape {list(shape)}, but {CONFIG} "
                f"makes it {list(edge.shape)}"
            )
    return dropped


def demand_fills(hf: HfModel, forward: tuple[Edge, ...]) -> None:
    """Tensors that MaxText has no parameter for must have the one value that its code stands for.

    Raises:
        UnsupportedError: One has another.
    """
    fills = {edge.target: edge for edge in forward if not edge.parts}
    views = {name: View(name, 0, edge.shape, edge.shape) for name, edge in fills.items()}
    source = Tensors(hf, views)
    for name, edge in fills.items():
        values = source.reader(name).read(())
        if not np.array_equal(values, np.full_like(values, edge.fill)):
            raise UnsupportedError(
                f"{name} is not all {edge.fill:g}, and MaxText's decoder block has nothing like it"
            )
