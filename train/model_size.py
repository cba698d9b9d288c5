"""Parameters of a model, and the FLOPs that a token needs of it: from the config, without MaxText.

Only for decoder blocks that moeconv knows by name and axes (`moeconv.arch.parameters`); a test
holds the counts to MaxText's own abstract model.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.arch.blocks import BLOCKS
from moeconv.arch.parameters import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_HEAD,
    PARAMETERS,
    LayerKind,
    axis_name,
)

# Weights and both of Adam's moments in float32.
STATE_BYTES = 12

# Dense FLOP/s of the tensor cores in 16 bits, by the vendor's data sheets; by words of the name
# that jax gives the device (`device_kind`), the longest first where one contains another.
PEAKS_16_BIT: Mapping[str, float] = {
    "T4": 65e12,
    "V100": 125e12,
    "V100-PCIE": 112e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A100": 312e12,
    "A10": 125e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
}


@dataclass(frozen=True)
class ModelSize:
    """What a model has, and what a token uses of it.

    Attributes:
        total: Parameters.
        active: Parameters that one token is multiplied with (top-k experts; the embedding once, as
            the output head).
        flops: Of one token of training: 6 for each active parameter, and attention over the half
            of a full row that causal masking leaves.
    """

    total: int
    active: int
    flops: float

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint with Adam's state."""
        return STATE_BYTES * self.total


def model_size(config: Mapping[str, Any]) -> ModelSize | None:
    """The size of a MaxText config's model; None for a decoder block that moeconv does not know."""
    block = str(config["decoder_block"])
    if block not in BLOCKS or config.get("use_qk_norm") or config.get("use_post_ffw_norm"):
        return None
    if int(config.get("global_parameter_scale") or 1) != 1:
        return None
    expert_width = f"base_{BLOCKS[block].moe_width_key}"
    layers, heads = int(config["base_num_decoder_layers"]), int(config["base_num_query_heads"])
    experts, chosen = int(config["num_experts"] or 1), int(config["num_experts_per_tok"] or 1)
    sizes = {
        "V": int(config["vocab_size"]),
        "D": int(config["base_emb_dim"]),
        "H": heads,
        "K": int(config["base_num_kv_heads"]),
        "h": int(config["head_dim"]),
        "F": int(config["base_mlp_dim"]),
        "F_moe": int(config[expert_width]),
        "E": experts,
    }
    tied = bool(config["logits_via_embedding"])
    # The table is looked up, which multiplies nothing, and is the head if that is tied.
    total = size_of(EMBEDDING, sizes) + size_of(FINAL_NORM, sizes)
    head = size_of(OUTPUT_HEAD, sizes)
    total, active = total + (0 if tied else head), size_of(FINAL_NORM, sizes) + head
    for kind in kinds(config, layers):
        for parameter in PARAMETERS.values():
            if parameter.layers is None or kind not in parameter.layers:
                continue
            count = size_of(parameter, sizes)
            total += count
            active += count * chosen // experts if "E" in parameter.axes[:1] else count
    row = int(config["max_target_length"])
    attention = 2 * 2 * layers * heads * sizes["h"] * row / 2
    return ModelSize(total, active, 6.0 * active + 3 * attention)


def size_of(parameter: Any, sizes: Mapping[str, int]) -> int:
    """Entries of one layer's parameter."""
    return math.prod(sizes[axis_name(parameter, axis)] for axis in parameter.axes)


def kinds(config: Mapping[str, Any], layers: int) -> list[LayerKind]:
    """What each layer is: experts in every one (mixtral), in every n-th (envy), or in none."""
    if int(config["num_experts"] or 1) <= 1:
        return [LayerKind.DENSE] * layers
    step = int(config.get("interleave_moe_layer_step") or 1)
    if str(config["decoder_block"]) != "envy":
        step = 1
    return [LayerKind.MOE if (i + 1) % step == 0 else LayerKind.DENSE for i in range(layers)]


def peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device in 16 bits; None where that is not known for certain."""
    if dtype not in ("float16", "bfloat16") or "MIG" in device_kind:  # a slice of a GPU
        return None
    for name in sorted(PEAKS_16_BIT, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_kind):
            if dtype == "bfloat16" and name in ("T4", "V100", "V100-PCIE"):
                return None  # no bfloat16 tensor cores
            return PEAKS_16_BIT[name]
    return None
