"""Parameters of a model, and the FLOPs that a token needs of it: from the config, without MaxText.

Only for decoder blocks that moeconv knows by name and axes (`moeconv.arch.parameters`); a test
holds the counts to MaxText's own abstract model.
"""

import math
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
    Parameter,
    axis_name,
)

# Weights and both of Adam's moments in float32.
STATE_BYTES = 12

# Dense FLOP/s in 16 bits by the vendor's data sheets, by the name that jax gives the device
# (`device_kind`); whether its tensor cores have bfloat16.
PEAKS_16_BIT: Mapping[str, tuple[float, bool]] = {
    "Tesla T4": (65e12, False),
    "NVIDIA A100-SXM4-40GB": (312e12, True),
    "NVIDIA A100-SXM4-80GB": (312e12, True),
    "NVIDIA H100 80GB HBM3": (989e12, True),
    "NVIDIA H200": (989e12, True),
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
    layers, heads = int(config["base_num_decoder_layers"]), int(config["base_num_query_heads"])
    experts, chosen = int(config["num_experts"] or 1), int(config["num_experts_per_tok"] or 1)
    sizes = {
        "V": int(config["vocab_size"]),
        "D": int(config["base_emb_dim"]),
        "H": heads,
        "K": int(config["base_num_kv_heads"]),
        "h": int(config["head_dim"]),
        "F": int(config["base_mlp_dim"]),
        "F_moe": int(config[f"base_{BLOCKS[block].moe_width_key}"]),
        "E": experts,
    }

    def size_of(parameter: Parameter) -> int:
        return math.prod(sizes[axis_name(parameter, axis)] for axis in parameter.axes)

    # The table is looked up, which multiplies nothing, and is the head if that is tied.
    head = size_of(OUTPUT_HEAD)
    active = size_of(FINAL_NORM) + head
    total = size_of(EMBEDDING) + size_of(FINAL_NORM)
    total += 0 if config["logits_via_embedding"] else head
    # Experts are in every layer (mixtral), in every n-th (envy), or in none.
    step = int(config.get("interleave_moe_layer_step") or 1) if block == "envy" else 1
    for layer in range(1, layers + 1):
        kind = LayerKind.MOE if experts > 1 and layer % step == 0 else LayerKind.DENSE
        for parameter in PARAMETERS.values():
            if parameter.layers is not None and kind in parameter.layers:
                count = size_of(parameter)
                total += count
                active += count * chosen // experts if "E" in parameter.axes[:1] else count
    attention = 2 * 2 * layers * heads * sizes["h"] * int(config["max_target_length"]) / 2
    return ModelSize(total, active, 6.0 * active + 3 * attention)


def peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device in 16 bits; None where that is not known for certain."""
    flops, has_bf16 = PEAKS_16_BIT.get(device_kind, (None, False))
    return flops if dtype == "float16" or (dtype == "bfloat16" and has_bf16) else None
