"""Special tokens that go with tiktoken ranks, whose file does not hold them.

Sources: MaxText's `TikTokenTokenizer` (`input_pipeline/tokenizer.py`); transformers'
`convert_llama_weights_to_hf.py` (`DEFAULT_LLAMA_SPECIAL_TOKENS`), `convert_llama4_weights_to_hf.py`
and `convert_gpt_oss_weights_to_hf.py`; `o200k_harmony` in tiktoken's `openai_public.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moeconv.errors import TokenizerError


@dataclass(frozen=True)
class SpecialTokens:
    """How texts are split before merging, and what comes after the last rank.

    Attributes:
        name: As it is asked for: `NAME:FILE`.
        pattern: Regex of the split.
        tokens: In the order of ids, from the first after the ranks.
        bos: The token that begins a text.
        eos: The token that ends one.
        pad: The padding token, if the set has one.
        begins: BOS is put before every text.
        ranks: How many ranks the set goes with; None for any number.
    """

    name: str
    pattern: str
    tokens: tuple[str, ...]
    bos: str
    eos: str
    pad: str | None = None
    begins: bool = True
    ranks: int | None = None


def _reserved(first: int, last: int, name: str = "") -> tuple[str, ...]:
    return tuple(f"<|{name}reserved_special_token_{i}|>" for i in range(first, last + 1))


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
_HEADER = ("<|start_header_id|>", "<|end_header_id|>")

LLAMA3 = SpecialTokens(
    name="llama3",
    pattern=_LLAMA3,
    tokens=(
        *(_BEGIN, _END),
        *_reserved(0, 3),
        *_HEADER,
        *_reserved(4, 4),
        "<|eot_id|>",
        *_reserved(5, 250),
    ),
    bos=_BEGIN,
    eos=_END,
)
_LLAMA31 = SpecialTokens(
    name="llama3.1",
    pattern=_LLAMA3,
    tokens=(
        *(_BEGIN, _END),
        *_reserved(0, 1),
        "<|finetune_right_pad_id|>",
        *_reserved(2, 2),
        *_HEADER,
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        *_reserved(3, 247),
    ),
    bos=_BEGIN,
    eos=_END,
    pad="<|finetune_right_pad_id|>",
    ranks=128_000,
)
_LLAMA4 = SpecialTokens(
    name="llama4",
    pattern=_O200K,
    tokens=(
        *(_BEGIN, _END),
        *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"),
        *_reserved(0, 5, "text_post_train_"),
        *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"),
        *_reserved(8, 68, "text_post_train_"),
        *("<|image_start|>", "<|image_end|>"),
        *_reserved(0, 1, "vision_"),
        *("<|tile_x_separator|>", "<|tile_y_separator|>"),
        *_reserved(2, 5, "vision_"),
        "<|image|>",
        *_reserved(6, 6, "vision_"),
        "<|patch|>",
        *_reserved(7, 1047, "vision_"),
    ),
    bos=_BEGIN,
    eos=_END,
    pad="<|finetune_right_pad|>",
    ranks=200_000,
)
_HARMONY = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}
_GPT_OSS = SpecialTokens(
    name="gpt-oss",
    pattern=_O200K,
    tokens=tuple(_HARMONY.get(i, f"<|reserved_{i}|>") for i in range(199_998, 200_019)),
    bos="<|startoftext|>",
    eos="<|endoftext|>",
    pad="<|endoftext|>",
    begins=False,
    ranks=199_998,
)
SETS: Mapping[str, SpecialTokens] = {s.name: s for s in (LLAMA3, _LLAMA31, _LLAMA4, _GPT_OSS)}


def asked_set(spec: str) -> tuple[SpecialTokens | None, str]:
    """The set that `NAME:FILE` asks for, and FILE; None and all of it where it names none."""
    name, colon, place = spec.partition(":")
    return (SETS[name], place) if colon and name in SETS else (None, spec)


def choose(
    asked: SpecialTokens | None, ranks: int, source: str
) -> tuple[SpecialTokens, tuple[str, ...]]:
    """The set for a number of ranks, and a note where it was not asked for.

    MaxText's own class puts Llama 3's tokens after any ranks; other models' ranks are known by
    their number, and may have been trained on either way.

    Raises:
        TokenizerError: Another number belongs to the set, or which is meant has to be said.
    """
    if asked is not None:
        if asked.ranks not in (None, ranks):
            raise TokenizerError(
                f"{source}: has {ranks} ranks, and {asked.name}'s special tokens come after "
                f"{asked.ranks}; give the ranks of that model, or another set"
            )
        return asked, ()
    others = [each for each in SETS.values() if each.ranks == ranks]
    if [each for each in others if each.pattern != LLAMA3.pattern]:
        name = others[0].name
        raise TokenizerError(
            f"{source}: has {ranks} ranks, as those of {name}; give {name}:FILE for that model's "
            f"own split and special tokens, or {LLAMA3.name}:FILE for those of MaxText's "
            "tokenizer_type tiktoken"
        )
    also = f"; give {others[0].name}:FILE for that model's names" if others else ""
    return LLAMA3, (
        f"{source}: the file has no special tokens; Llama 3's are put after its {ranks} ranks, as "
        f"MaxText's tokenizer_type tiktoken does{also}",
    )
