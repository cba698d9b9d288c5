"""Parameters of a model, and the FLOPs that a token needs of it: from the config, without MaxText.

Only for decoder blocks that moeconv knows by name and axes (`moeconv.arch.parameters`); a test
holds the counts to MaxText's own abstract model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.arch.parameters import AXES, DENSE, MOE, LayerKind
from moeconv.families import blocks

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
    """The size of a MaxText config's model; None for one whose parameters are not known here."""
    block = blocks().get(str(config["decoder_block"]))
    if block is None or config.get("use_qk_norm") or config.get("use_post_ffw_norm"):
        return None
    if int(config.get("global_parameter_scale") or 1) != 1:
        return None
    layers, heads = int(config["base_num_decoder_layers"]), int(config["base_num_query_heads"])
    experts, chosen = int(config["num_experts"] or 1), int(config["num_experts_per_tok"] or 1)
    lengths = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["base_emb_dim"],
        "num_attention_heads": heads,
        "num_key_value_heads": config["base_num_kv_heads"],
        "head_dim": config["head_dim"],
        "intermediate_size": config["base_mlp_dim"],
        "moe_intermediate_size": config[f"base_{block.expert_width}"],
        "num_experts": experts,
    }
    sizes = {axis: int(lengths[name]) for axis, name in AXES.items() if name in lengths}
    if {axis for each in block.outer for axis in each.axes} - sizes.keys():
        return None
    embedding, *norms, head = (math.prod(sizes[a] for a in p.axes) for p in block.outer)
    norm = sum(norms)
    # The table is looked up, which multiplies nothing, and is the head if that is tied.
    total = embedding + norm + (0 if config["logits_via_embedding"] else head)
    active = norm + head
    for kind in kinds(config, layers):
        parameters = block.layers.get(kind)
        if parameters is None or {axis for each in parameters for axis in each.axes} - sizes.keys():
            return None
        for parameter in parameters:
            count = math.prod(sizes[axis] for axis in parameter.axes)
            total += count
            active += count * chosen // experts if parameter.axes[0] == "E" else count
    row = int(config["max_target_length"])
    attention = 2 * 2 * layers * heads * sizes["h"] * row / 2
    return ModelSize(total, active, 6.0 * active + 3 * attention)


def kinds(config: Mapping[str, Any], layers: int) -> list[LayerKind]:
    """What each layer is: experts in every one, in every n-th (envy), or in none."""
    if int(config["num_experts"] or 1) <= 1:
        return [DENSE] * layers
    step = int(config.get("interleave_moe_layer_step") or 1)
    if str(config["decoder_block"]) != "envy":
        step = 1
    return [MOE if (i + 1) % step == 0 else DENSE for i in range(layers)]


def peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device in 16 bits; None where that is not known for certain."""
    flops, has_bf16 = PEAKS_16_BIT.get(device_kind, (None, False))
    return flops if dtype == "float16" or (dtype == "bfloat16" and has_bf16) else None
