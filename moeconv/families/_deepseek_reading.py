"""How a config.json of DeepSeek's architectures is read, on the way to MaxText."""

import math
from collections.abc import Callable
from typing import Any

from moeconv.errors import UnsupportedError
from moeconv.families._deepseek import AS_V3
from moeconv.mapping.reading import Config, Reading, rope_fields, rope_of, yarn_settings


def _read_rope(config: Config) -> dict[str, Any]:
    """Its RoPE, with the scale of what is rotated (`_compute_yarn_parameters`)."""
    rope = rope_of(config)
    if rope["rope_type"] != "yarn":
        return rope
    one, other, factor = rope.get("mscale"), rope.get("mscale_all_dim"), rope["factor"]
    scale = rope.get("attention_factor")
    if scale is None and one and other:
        scale = _yarn_scale(factor, one) / _yarn_scale(factor, other)
    return {
        **rope,
        "attention_factor": _yarn_scale(factor, 1.0) if scale is None else scale,
        "mscale": 0.0,
        "mscale_all_dim": other or 0.0,
    }


def _yarn_scale(factor: float, mscale: float) -> float:
    """modeling_rope_utils.py `get_mscale`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _always(value: Any) -> Callable[[Config], Any]:
    return lambda config: value


def reading(*, biased: bool, **own: Any) -> Reading:
    """How a config of DeepSeek's architectures is read.

    Args:
        biased: The router has a bias.
        own: As in `config`.
    """
    score = own["scoring_func"]

    def fields(config: Config) -> dict[str, Any]:
        attention = "mla_lora" if config["q_lora_rank"] else "mla"
        routed = f"{attention} moe+bias" if biased else f"{attention} moe"
        if config.get("head_dim") not in (None, config["qk_rope_head_dim"]):
            raise UnsupportedError(
                f"head_dim is {config['head_dim']}, by which transformers rotates, and "
                f"qk_rope_head_dim {config['qk_rope_head_dim']}"
            )
        layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
        return {
            **rope_fields(rope_of(config)),
            "layer_kinds": [f"{attention} dense"] * dense + [routed] * (layers - dense),
            "head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "intermediate_size": config["intermediate_size"] if dense else None,
            "shared_intermediate_size": config["n_shared_experts"]
            * config["moe_intermediate_size"],
        }

    def settings(config: Config) -> dict[str, Any]:
        rope = _read_rope(config)
        yarn = yarn_settings(rope, config, interleave=True)
        grouped = config["n_group"] > 1
        return {
            **yarn,
            "routed_score_func": score,
            "n_routing_groups": config["n_group"] if grouped else -1,
            "topk_routing_group": config["topk_group"] if grouped else -1,
            "routing": AS_V3 if biased else "by biased scores",
            "routed_bias": biased,
            "mscale": float(rope.get("mscale_all_dim", 0.0)),
        }

    return Reading(
        {
            "num_key_value_heads": lambda c: c["num_attention_heads"],
            "n_group": lambda c: 1,
            "topk_group": lambda c: 1,
            "moe_layer_freq": lambda c: 1,
            **{key: _always(value) for key, value in own.items()},
        },
        fields,
        settings,
        _read_rope,
        # Training's losses; layers that predict further tokens are left out with their tensors.
        ignored=frozenset(
            {
                "aux_loss_alpha",
                "ep_size",
                "head_dim",
                "num_mtp_layers",
                "qk_head_dim",
                "num_nextn_predict_layers",
                "seq_aux",
            }
        ),
    )
