"""The weights of the lab's checkpoints (maxtext_lab.py)."""

import zlib
from typing import Any

import numpy as np

from moeconv.families import blocks


class Weights:
    """Values that make every mistake visible.

    Logits come out with a standard deviation near 1, attention and routing are peaked (scores of
    about 2), and no norm scale is 1, so a wrong theta, scale, order or missing fold shows as a
    difference of the logits above 0.1.
    """

    def __init__(self, config: Any, seed: int) -> None:
        self._seed = seed
        self._scan_axis = config.param_scan_axis if config.scan_layers else None
        self._layers = config.num_decoder_layers
        self._dense = config.first_num_dense_layers
        # Whose norms are kept as what is added to 1 (layers/normalizations.py `Qwen3NextRMSNorm`).
        self._centred = config.decoder_block.value in ("qwen3_next", "qwen3_5", "gpt3")
        # Its router sees 1/sqrt(width) of what others see (models/gemma4.py `Gemma4MoE`), and its
        # norms, but for these, make scores of sqrt(head_dim) and layers that drown the ones before.
        gemma4 = config.decoder_block.value in ("gemma4", "gemma4_small")
        gated = 1.0 if gemma4 else 1.0 / np.sqrt(config.emb_dim)
        self._halved = (
            ("query_norm.scale", "post_self_attention_norm.scale", "post_ffw_norm.scale")
            if gemma4
            else ()
        )
        of_six = config.decoder_block.value in ("gemma3", "gemma4")
        self._cycle = 6 if of_six else config.inhomogeneous_layer_cycle_interval
        width, heads, head = config.emb_dim, config.num_query_heads, config.head_dim
        folded = blocks()[config.decoder_block.value].query_scale_in_kernel
        normalized = config.normalize_embedding_logits or not config.logits_via_embedding
        self._scale = {
            "embed_tokens_per_layer": 1.0 / np.sqrt(config.hidden_size_per_layer_input or 1),
            "per_layer_model_projection.kernel": 1.0,
            "per_layer_input_gate.kernel": 1.5 / np.sqrt(width),
            "per_layer_projection.kernel": 1.0,
            "query.kernel": 1.5 / np.sqrt(width) / (np.sqrt(head) if folded else 1.0),
            "key.kernel": 1.5 / np.sqrt(width),
            "value.kernel": 1.0 / np.sqrt(width),
            "out.kernel": 1.0 / np.sqrt(heads * head),
            "gate.kernel": 2.0 * gated,
            "wq_a.kernel": 1.0 / np.sqrt(width),
            "wq_b.kernel": 1.5 / np.sqrt(config.q_lora_rank or 1),
            "indexer.wk.kernel": 1.5 / np.sqrt(width),
            "weights_proj.kernel": 1.0 / np.sqrt(width),
            "wkv_a.kernel": 1.5 / np.sqrt(width),
            "wkv_b.kernel": 1.5 / np.sqrt(config.kv_lora_rank),
            "in_proj_qkvz.kernel": 1.5 / np.sqrt(width),
            "in_proj_ba.kernel": 1.0 / np.sqrt(width),
            "conv1d.kernel": 1.0,
            "out_proj.kernel": 1.0
            / np.sqrt(config.gdn_num_value_heads * config.gdn_value_head_dim),
            ".wi_0": 1.5 / np.sqrt(width),
            ".wi_1": 1.5 / np.sqrt(width),
            ".wo": 1.0 / np.sqrt(config.moe_mlp_dim),
            "wi_0.kernel": 1.5 / np.sqrt(width),
            "wi_1.kernel": 1.5 / np.sqrt(width),
            "wo.kernel": 1.0 / np.sqrt(config.mlp_dim),
            "qkv_proj.kernel": 1.5 / np.sqrt(width),
            "mlp.wi.kernel": 1.5 / np.sqrt(width),
            "position_embedder.embedding": 0.7 if normalized else 0.7 / np.sqrt(width),
            "logits_dense.kernel": 1.0 / np.sqrt(width),
            "token_embedder.embedding": 1.0 if normalized else 1.0 / np.sqrt(width),
        }

    def __call__(self, name: str, leaf: Any, *, parameter: bool = True) -> np.ndarray:
        """The values of variable `name`, which has the shape and dtype of `leaf`."""
        parts = name.split(".")
        # The layers of DeepSeek's two stacks are numbered on.
        first = {"dense_layers": 0, "moe_layers": self._dense}
        if self._scan_axis is not None and parts[0] == "decoder" and parts[1] in first:
            shape, rest = list(leaf.shape), ".".join(parts[2:])
            # layers/nnx_scan.py stacks all but `nnx.Param` on axis 0.
            axis = self._scan_axis if parameter and len(shape) > self._scan_axis else 0
            length = shape.pop(axis)
            layers = range(first[parts[1]], first[parts[1]] + length)
            value = np.stack([self._array(rest, n, tuple(shape)) for n in layers], axis=axis)
        elif parts[0] == "decoder" and parts[1].rpartition("_")[0] in first:
            stack, _, number = parts[1].rpartition("_")
            value = self._array(".".join(parts[2:]), first[stack] + int(number), leaf.shape)
        elif len(parts) > 2 and parts[2] in ("local_layers", "global_layer"):
            value = self._nested(parts, leaf.shape)
        elif self._scan_axis is not None and parts[:2] == ["decoder", "layers"]:
            # decoder.layers.layers_1.rest: index i of its stack is layer i * cycle + 1.
            rest = parts[2:]
            offset = 0
            if rest[0].startswith(("layers_", "layer_")):
                offset, rest = int(rest[0].rpartition("_")[2]), rest[1:]
            shape = list(leaf.shape)
            # MaxText stacks parameters of too few axes on axis 0 (layers/nnx_scan.py).
            axis = self._scan_axis if len(shape) > self._scan_axis else 0
            length = shape.pop(axis)
            layers = range(offset, self._layers, self._cycle)[:length]
            value = np.stack(
                [self._array(".".join(rest), layer, tuple(shape)) for layer in layers],
                axis=axis,
            )
        elif parts[:2] == ["decoder", "layers_remainder"]:
            # Behind the blocks of six (layers/nnx_decoders.py `_init_scanned_gemma3`).
            layer = self._layers // 6 * 6 + int(parts[2].removeprefix("layers_"))
            value = self._array(".".join(parts[3:]), layer, leaf.shape)
        elif parts[0] == "decoder" and parts[1].startswith("layers_"):
            layer = int(parts[1].removeprefix("layers_"))
            value = self._array(".".join(parts[2:]), layer, leaf.shape)
        else:
            value = self._array(name, None, leaf.shape)
        return value.astype(leaf.dtype)

    def _nested(self, parts: list[str], whole: tuple[int, ...]) -> np.ndarray:
        """Of blocks with a stack of their own, or the last layer of each, or of what is left."""
        shape, axes, depths = list(whole), [], []
        stacks = 2 if parts[2] == "local_layers" and parts[1] != "layers_remainder" else 1
        for _ in range(stacks):  # the outer one was made last
            axes.append(self._scan_axis if len(shape) > self._scan_axis else 0)
            depths.append(shape.pop(axes[-1]))
        first = {"local_layers": 0, "global_layer": self._cycle - 1}[parts[2]]
        if parts[1] == "layers_remainder":
            layers = self._layers - depths[0] + np.arange(depths[0])
        else:
            layers = first + self._cycle * np.arange(depths[0])
            if stacks == 2:
                layers = layers[:, None] + np.arange(depths[1])
        name = ".".join(parts[3:])
        value = np.stack([self._array(name, int(n), tuple(shape)) for n in layers.flat])
        value = value.reshape(*layers.shape, *shape)
        for axis in reversed(axes):  # from the inner one
            value = np.moveaxis(value, layers.ndim - 1, axis + layers.ndim - 1)
            layers = layers[..., 0] if layers.ndim > 1 else layers[0]
        return value

    def _array(self, name: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
        seed = (self._seed, zlib.crc32(name.encode()), -1 if layer is None else layer)
        draw = np.random.default_rng([part % 2**32 for part in seed]).standard_normal(shape)
        if name.endswith((".scale", "_scale", "scale_2", "scalar")):
            scale = (0.0 if self._centred and "rms_norm" not in name else 1.0) + 0.25 * draw
            return 0.5 * scale if name.endswith(self._halved) else scale
        if name.endswith("A_log"):  # a memory of some 20 tokens
            return 0.5 * draw - 1.5
        if name.endswith(("bias", "sinks")):
            return 0.3 * draw
        suffixes = [suffix for suffix in self._scale if name.endswith(suffix)]
        if not suffixes:
            raise NotImplementedError(f"the lab has no scale for {name}")
        return self._scale[suffixes[0]] * draw
