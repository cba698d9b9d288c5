"""The converted model as stock transformers computes it: whole, or one layer at a time.

Both ways load through `from_pretrained`, so that transformers' own conversion of the stored names
(v5 fuses experts in memory, core_model_loading.py) is part of what is compared.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.errors import (
    MoeconvError,
    TensorError,
    UsageError,
)
from moeconv.hf.safetensors import TensorSpec, read_header
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import SIGNIFICAND_BITS
from moeconv.tensor.values import Cast
from moeconv.verification.boundary import blaming
from moeconv.verification.measure.rounding import Rounding
from moeconv.verification.models.expert_groups import Groups
from moeconv.verification.models.layerwise import LayerTrace
from moeconv.verification.models.maxtext_head import Head
from moeconv.verification.models.transformers_beside import Beside
from moeconv.verification.models.transformers_experts import (
    grouped_block,
    grouped_experts,
    groups_of,
    slice_of,
    with_experts,
)
from moeconv.verification.models.transformers_load import (
    build_empty,
    check_folder,
    check_whole,
    load_config,
    load_model,
    load_tensors,
    quiet,
)
from moeconv.verification.models.transformers_parts import (
    attention,
    feed_forward,
    mlp_of,
    owner_of,
    part_at,
    probe_of,
    router_of,
    silent,
    tap,
    tap_router,
    to_numpy,
)
from moeconv.verification.models.transformers_tensors import ReadTensor, StoredTensors


class HfModel:
    """A Hugging Face model directory, whole in memory."""

    def __init__(self, model: Any, folder: Path, blame: type[MoeconvError]) -> None:
        self._model, self._folder, self._blame = model, folder, blame

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        blame: type[MoeconvError] = TensorError,
    ) -> "HfModel":
        """Loads by transformers, with attention and experts in their plain implementations.

        Nothing is fetched, no code of the directory is run, and a parameter that transformers would
        make up or leave out is an error.

        Args:
            folder: The model.
            dtype: What it is computed in.
            device: Where.
            blame: Raised where the model cannot be loaded whole, or later cannot be run.

        Raises:
            ConfigError: The folder has no config.json.
            TensorError: It has no weights.
            MissingPackageError: torch or transformers is not installed.
            MemoryLimitError: The machine is too small.
        """
        folder = check_folder(folder)
        with quiet(), blaming(f"transformers cannot load {folder}", blame):
            import torch

            model, report = load_model(folder, dtype=getattr(torch, dtype))
            check_whole(folder, report)
            return cls(model.to(device).eval(), folder, blame)

    def _running(self) -> contextlib.AbstractContextManager[None]:
        return blaming(f"transformers cannot run {self._folder}", self._blame)

    def run(self, tokens: Array) -> tuple[Array, dict[int, Array]]:
        """Logits [B, T, V] of `tokens` [B, T], and router logits [B, T, E] by layer; float32."""
        import torch

        kept: dict[int, Any] = {}
        with contextlib.ExitStack() as stack, torch.inference_mode():
            stack.enter_context(self._running())
            probe = probe_of(self._model.config)
            for number, layer in enumerate(part_at(self._model, probe.layers)):
                stack.enter_context(tap_router(layer, probe, kept, number))
            ids = torch.from_numpy(np.asarray(tokens, np.int64)).to(self._model.device)
            logits = self._model(input_ids=ids, use_cache=False).logits
            shape = tokens.shape
            routers = {n: to_numpy(value).reshape(*shape, -1) for n, value in kept.items()}
            return to_numpy(logits), routers

    def generate(self, prompt: Array, count: int) -> Array:
        """`prompt` [T] and `count` greedy tokens more, with the KV cache, by `generate`."""
        import torch
        import transformers

        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=count, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        ids = torch.from_numpy(np.asarray(prompt, np.int64))[None].to(self._model.device)
        with torch.inference_mode(), quiet(), self._running():
            whole = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        made: Array = whole[0].cpu().numpy()
        return made


class HfLayers:
    """A Hugging Face model directory of which one layer is in memory.

    Layer n is run as the only layer of a model of the same config, whose final norm and head are
    not used; embedding, final norm and head are a model of no layers. Which kind of layer n is,
    transformers says: it builds the whole model on the meta device.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str = "float32",
        rounding: Rounding | None = None,
        blame: type[MoeconvError] = TensorError,
    ) -> None:
        """Reads the config and the names of all tensors.

        Args:
            folder: The model.
            dtype: What it is computed in.
            rounding: Weights are moved as much as this rounds them.
            blame: Raised where the model cannot be loaded or run.

        Raises:
            ConfigError: The folder has no config.json.
            TensorError: It has no weights.
            MissingPackageError: torch or transformers is not installed.
            MemoryLimitError: The machine is too small.
        """
        self._folder, self._blame = check_folder(folder), blame
        self.name = "transformers"
        with quiet(), blaming(f"transformers cannot load {self._folder}", blame):
            import torch

            self._config = load_config(self._folder)
            self._meta = build_empty(self._config)
            self._probe = probe_of(self._config)
            self._stored = StoredTensors(self._folder, rounding)
        self._dtype = getattr(torch, dtype)
        self.num_layers: int = self._config.num_hidden_layers
        self._beside = Beside(self._probe, self._stored, self.num_layers)
        self._outer: Any = None

    def _running(self) -> contextlib.AbstractContextManager[None]:
        return blaming(f"transformers cannot run {self._folder}", self._blame)

    def embed(self, tokens: Array) -> Array:
        """See `LayerwiseModel`."""
        import torch

        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        with torch.inference_mode(), self._running():
            model, probe = self._globals(), self._probe
            found = part_at(model, probe.embedding)(ids)
            if probe.positions:
                found = found + part_at(model, probe.positions)(torch.arange(ids.shape[1]))
            self._beside.start(ids, found)
            return to_numpy(found)

    def norm(self, hidden: Array) -> Array:
        """See `LayerwiseModel`."""
        return self._apply(lambda model: part_at(model, self._probe.norm), hidden)

    def logits(self, normed: Array, head: Head = "stock") -> Array:
        """See `LayerwiseModel`; transformers has one head only.

        With all that the model does around it, such as a soft cap: it is run whole, without layers,
        on `normed` in place of the final norm's output.
        """

        def whole(model: Any) -> Callable[[Any], Any]:
            owner, name = owner_of(model, self._probe.norm)
            norm = getattr(owner, name)

            def run(values: Any) -> Any:
                import torch

                setattr(owner, name, torch.nn.Identity())
                try:
                    with silent(model, self._probe.positions):
                        return model(inputs_embeds=values, use_cache=False).logits
                finally:
                    setattr(owner, name, norm)

            return run

        return self._apply(whole, normed)

    def release(self) -> None:
        """See `LayerwiseModel`."""
        self._outer = None
        gc.collect()  # models of both frameworks are part of reference cycles

    def layer(self, number: int, hidden: Array) -> LayerTrace:
        """See `LayerwiseModel`."""
        import torch

        kept: dict[str, Any] = {}
        with contextlib.ExitStack() as stack, torch.inference_mode():
            stack.enter_context(self._running())
            model = self._single(number)
            layer = part_at(model, self._probe.layers)[0]
            stack.enter_context(tap(attention(layer, self._probe), kept, "attention"))
            stack.enter_context(tap(feed_forward(layer, self._probe), kept, "experts"))
            stack.enter_context(tap(layer, kept, "output"))
            stack.enter_context(tap_router(layer, self._probe, kept, "router"))
            inputs = torch.from_numpy(np.array(hidden)).to(self._dtype)
            further = self._beside.inputs(model, len(hidden))
            self._beside.keep(model(inputs_embeds=inputs, use_cache=False, **further))
            shape = hidden.shape[:2]
            found = {name: to_numpy(value).reshape(*shape, -1) for name, value in kept.items()}
        return LayerTrace(
            found["attention"], found.get("router"), found["experts"], found["output"]
        )

    def _apply(self, part: Callable[[Any], Any], values: Array) -> Array:
        import torch

        with torch.inference_mode(), self._running():
            module = part(self._globals())
            return to_numpy(module(torch.from_numpy(np.array(values)).to(self._dtype)))

    def _globals(self) -> Any:
        """The model of no layers."""
        if self._outer is None:
            config, probe = self._cut(slice(0, 0)), self._probe
            probe.cut(config, self._config, None)
            within = f"{probe.layers}."
            outside = [name for name in self._stored if not name.startswith(within)]
            names = {name: name for name in outside if name not in self._beside.names}
            self._outer = self._build(config, _whole(self._stored.readers(names)))
        return self._outer

    def _single(self, number: int) -> Any:
        """The model whose only layer is layer `number`."""
        config, probe = self._cut(slice(number, number + 1)), self._probe
        config.vocab_size = 1
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        whole = part_at(self._meta, probe.layers)[number]
        wanted = type(feed_forward(whole, probe))
        probe.cut(config, self._config, number)
        probe.alone(config, number, router_of(whole, probe) is not None)
        prefix = f"{probe.layers}.{number}."
        names = {
            name: f"{probe.layers}.0." + name.removeprefix(prefix)
            for name in self._stored
            if name.startswith(prefix)
        }
        groups = groups_of(feed_forward(whole, probe))
        model = (
            self._filled(config, _whole(self._stored.readers(names)) | self._beside.tensors(number))
            if groups is None
            else self._in_groups(config, feed_forward(whole, probe), names, groups)
        )
        built = type(feed_forward(part_at(model, probe.layers)[0], probe))
        if built is not wanted:
            raise TensorError(
                f"{self._folder / 'config.json'}: layer {number} alone is a {built.__name__}, "
                f"within the model a {wanted.__name__}"
            )
        return model

    def _filled(self, config: Any, tensors: dict[str, Any]) -> Any:
        """The model of one layer, which has no vocabulary."""
        import torch

        width, probe = self._config.hidden_size, self._probe
        tensors[f"{probe.embedding}.weight"] = torch.zeros(1, width)
        for name, each in part_at(self._meta, probe.norm).named_parameters():
            tensors[f"{probe.norm}.{name}"] = torch.ones(each.shape)
        if probe.positions:
            rows = part_at(self._meta, probe.positions).num_embeddings
            tensors[f"{probe.positions}.weight"] = torch.zeros(rows, width)
        if not config.tie_word_embeddings:
            tensors[f"{probe.head}.weight"] = torch.zeros(1, width)
        return self._build(config, tensors)

    def _in_groups(self, config: Any, whole: Any, names: Mapping[str, str], groups: Groups) -> Any:
        """The same of a layer whose experts do not fit into memory."""
        probe, few = self._probe, with_experts(config, groups.size)
        part = feed_forward(part_at(build_empty(few), probe.layers)[0], probe)

        def built(experts: slice) -> Any:
            # Mapped anew for each group: what was read of the others stays in memory no longer.
            return self._filled(few, slice_of(self._stored.readers(names), whole, part, experts))

        def load(experts: slice) -> Any:
            return feed_forward(part_at(built(experts), probe.layers)[0], probe).experts

        model = built(next(iter(groups)))
        owner, name = mlp_of(part_at(model, probe.layers)[0], probe)
        experts, stored = grouped_experts(groups, load), self._stored.readers(names)
        block = grouped_block(whole, getattr(owner, name), stored, experts)
        setattr(owner, name, block)
        return model

    def _cut(self, layers: slice) -> Any:
        """The config of these layers alone; `layer_types` is every architecture's word for theirs.

        transformers demands as many of them as layers (configuration_utils.py
        `validate_layer_type`).
        """
        config = copy.deepcopy(self._config)
        config.num_hidden_layers = layers.stop - layers.start
        if (kinds := getattr(config, "layer_types", None)) is not None:
            config.layer_types = kinds[layers]
        return config

    def _build(self, config: Any, tensors: dict[str, Any]) -> Any:
        with quiet():
            model, report = load_tensors(type(self._meta), config, tensors, dtype=self._dtype)
        check_whole(self._folder, report)
        return model.eval()


def rounding_between(one: Path, other: Path) -> Rounding | None:
    """The rounding between two models, if one of them is stored narrower than the other."""
    bits = [
        min((SIGNIFICAND_BITS[d], d) for spec in _specs(folder) if (d := spec.dtype))
        for folder in (one, other)
    ]
    narrow = min(bits)
    if bits[0] == bits[1] or narrow[1] == "float32":
        return None
    return Rounding(Cast("float32", narrow[1]))


def _specs(folder: Path) -> list[TensorSpec]:
    files = sorted(check_folder(folder).glob("*.safetensors"))
    return [spec for file in files for spec, _ in read_header(file).values()]


def check_tokens(tokens: Array) -> Array:
    """Integer ids [B, T]."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError(
            f"Tokens must be integers [B, T], not {tokens.dtype} {list(tokens.shape)}."
        )
    return tokens


def hf_logits(
    model_dir: str | Path, tokens: Array, *, dtype: str = "float32", device: str = "cpu"
) -> Array:
    """Logits [B, T, V] of a Hugging Face model directory in float32; errors as `HfModel.load`."""
    check_folder(model_dir)
    tokens = check_tokens(tokens)
    return HfModel.load(model_dir, dtype=dtype, device=device).run(tokens)[0]


def _whole(stored: Mapping[str, ReadTensor]) -> dict[str, Any]:
    return {name: read(None) for name, read in stored.items()}
