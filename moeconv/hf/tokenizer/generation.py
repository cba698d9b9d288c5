"""What a tokenizer's own `generation_config.json` says, as far as it is data.

Chat models list several tokens that end a text there and nowhere else (Llama 3.1, Gemma, Qwen).
"""

from collections.abc import Mapping
from typing import Any

from moeconv.errors import TokenizerError
from moeconv.untrusted.text import printable

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of transformers' GenerationConfig what only shapes the sampling. Its other fields may ask for
# another search, a draft model, a compiler or code, and are left out.
_NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
)
_SWITCHES = ("do_sample",)
# Written anew by convert.
_OURS = ("_from_model_config", "transformers_version")


def read_generation(content: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Takes over token ids and sampling.

    Args:
        content: The file's object.
        source: Where the tokenizer is, for people.

    Returns:
        The fields, lists of ids as tuples (one id is no list), and a note on those left out.

    Raises:
        TokenizerError: A field has a value that transformers could not use.
    """
    taken: dict[str, Any] = {}
    left = []
    for name, value in content.items():
        if value is None or name in _OURS:
            continue
        if name in TOKEN_IDS:
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise _wrong(source, name, value)
            taken[name] = ids[0] if len(ids) == 1 else tuple(dict.fromkeys(ids))
        elif name in _NUMBERS or name in _SWITCHES:
            if isinstance(value, bool) != (name in _SWITCHES) or not isinstance(value, int | float):
                raise _wrong(source, name, value)
            taken[name] = value
        else:
            left.append(name)
    if not left:
        return taken, []
    return taken, [
        f"{source}: {GENERATION_CONFIG}: not taken over, as it is more than token ids and "
        f"sampling: {printable(', '.join(sorted(left)[:10]))}{', …' if left[10:] else ''}"
    ]


def _wrong(source: str, name: str, value: object) -> TokenizerError:
    return TokenizerError(
        f"{source}: {GENERATION_CONFIG}: {name} is {printable(repr(value))[:60]}, which "
        "transformers cannot use; correct the file, or remove it"
    )
