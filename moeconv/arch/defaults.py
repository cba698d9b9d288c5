"""What MaxText's releases give by themselves: defaults, models; and which settings decide."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from moeconv.arch.keys import keys

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# A resolved config holds derived keys too; `emb_dim` is `base_emb_dim` times a power of two.
SCALED_KEYS = {
    "emb_dim": "base_emb_dim",
    "num_query_heads": "base_num_query_heads",
    "num_kv_heads": "base_num_kv_heads",
    "mlp_dim": "base_mlp_dim",
    "moe_mlp_dim": "base_moe_mlp_dim",
    "num_decoder_layers": "base_num_decoder_layers",
}


# Defaults of base.yml that once were others: the value, and until when. A checkpoint of that time
# can be read as well, and shapes do not show it (AI-Hypercomputer/maxtext#414, the only one whose
# value decides a conversion; between 0.1.0 and 0.2.5 tools/maxtext_defaults.py finds none).
CHANGED: Mapping[str, tuple[Any, str]] = {
    "normalization_layer_epsilon": (1e-6, "February 2024"),
}


@cache
def maxtext_defaults() -> dict[str, Any]:
    """The packaged extract of MaxText's YAML files, made by tools/maxtext_defaults.py."""
    path = resources.files("moeconv.arch") / "data" / "maxtext_defaults.json"
    data: dict[str, Any] = json.loads(path.read_text())
    return data


@cache
def known_keys() -> frozenset[str]:
    """Config keys that decide a conversion."""
    deciding = {name for name, key in keys().items() if key.kind in ("function", "size", "derived")}
    return frozenset({*deciding, *maxtext_defaults()["base"], *SCALED_KEYS, *TOKEN_IDS})
