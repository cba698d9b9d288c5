"""How the config.json of a GPT-OSS is read, on the way from Hugging Face to MaxText."""

from moeconv.families._shared import DERIVED, rope_reading, yarn_reading
from moeconv.mapping.reading import Reading, typed

# models/gpt_oss.py `GPT_OSS_ATTENTION_PATTERN`: a scanned block begins it anew.
PATTERN = ("sliding_attention", "full_attention")
# configuration_gpt_oss.py: what a config without RoPE means.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

READING = Reading(
    {
        **DERIVED,
        "layer_types": typed(2, *PATTERN),
        "rope_parameters": lambda c: None if c.get("rope_scaling") else _YARN,
        "swiglu_limit": lambda c: 7.0,
        "swiglu_alpha": lambda c: 1.702,
    },
    rope_reading,
    yarn_reading,
    ignored=frozenset({"initial_context_length", "experts_per_token"}),
)
