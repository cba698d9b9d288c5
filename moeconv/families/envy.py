"""Envy: MaxText's block of dense and Mixture-of-Experts layers in turn; no target is its own.

Of its own additions to Mixtral (models/envy.py) QK norm makes it a Qwen3-MoE, and the norm behind
the feed-forward half must be off: all four configs that MaxText ships have both. Of transformers'
architectures with a norm behind the feed-forward half (5.23: modeling_*.py, every decoder layer)
each has one behind attention too, which no weight makes an identity.
"""

from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import DENSE, MOE, LayerKind
from moeconv.arch.stacks import CYCLED, SCANNED, UNSCANNED
from moeconv.families._shared import (
    ATTENTION_PARAMETERS,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    MLP_PARAMETERS,
    QUANTISES,
    moe_parameters,
)
from moeconv.families.qwen3 import QK_NORM


def _config(model: ModelDescription, cycle: int) -> dict[str, Any]:
    """Where the experts are; the norm behind them is off, or the checkpoint had it."""
    step = model.moe_layers[0] + 1 if model.moe_layers else 0
    return {
        "interleave_moe_layer_step": step,
        "inhomogeneous_layer_cycle_interval": cycle if cycle > 1 else step,
        "use_post_ffw_norm": False,
    }


BLOCK = Block(
    name="envy",
    since="0.2.4",
    note="dense and Mixture-of-Experts layers interleaved",
    layers={
        DENSE: (*ATTENTION_PARAMETERS, *MLP_PARAMETERS),
        MOE: (*ATTENTION_PARAMETERS, *moe_parameters("MoeBlock_0")),
        LayerKind("qk_norm dense"): (*ATTENTION_PARAMETERS, *QK_NORM, *MLP_PARAMETERS),
        LayerKind("qk_norm moe"): (
            *ATTENTION_PARAMETERS,
            *QK_NORM,
            *moe_parameters("MoeBlock_0"),
        ),
    },
    targets=("mixtral", "ernie4_5_moe", "llama", "qwen3_moe", "qwen3"),
    stackings=(UNSCANNED, CYCLED, SCANNED),
    query_scale_in_kernel=False,  # it passes `query_pre_attn_scalar`
    shown={"use_qk_norm": "qk_norm"},
    config=_config,
    taps=Taps(mlp={"dense": "mlp", "moe": "MoeBlock_0"}),
    honours={"norm_topk_prob": (True,)},  # as it always does
    idle=IDLE | IDLE_MOE,
    warns={**DROPS_TOKENS, **QUANTISES},
    refuses={
        "use_post_ffw_norm": "adds a norm behind the MLP, and no stock architecture has one there "
        "without another behind attention",
    },
)
