"""What the tests of sentencepiece models share: texts, training small models, comparing ids."""

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizer_lab import REPOSITORY
from tokenizers import Tokenizer

from moeconv.hf.tokenizer import TokenizerFiles, read_tokenizer

_ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    " ",
    "  ",
    "0123456789",
    ".,;:!?-_()[]{}<>/\\'\"",
    "éèüöñçßøåÆŒİıſ",
    "абвгдежзийкл",
    "αβγδεζ",
    "あいうえおカキクケゴ",
    "我能吞下玻璃而不伤身体",
    "다람쥐헌쳇바퀴ㄳㄱ",
    "نصحكيم",
    "\t\n\r\x01\x7f",
    "▁",
    "👩\u200d👧🏽🏳️🇫🇷",
    "ｋａｔ１２㍿½ﬁ①ﾞ～",
    "\u0300\u0301\u0308\u030a\u0323\u0327\u0338\u0344\u0345",
    "\u00a0\u3000\u200b\u2028\ufeff",
]


_CODE = [
    "def encode(self, s: str) -> list[int]:  # <text> {0} & more; see [1], 50% of $3 ~ 'a^b'",
    '    return [x for x in self._ids(s) if x >= 0 and x != 7] or "nothing"  | @cached',
    "| model | tokens | 0123456789 |",
    "|-------|-------:|-----------:|",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } /* 3.14159 */ return !done ? `x` : \\n;",
    "L'été à Noël, où çà? ¿Qué? Größe, smørrebrød, žluťoučký kůň; Ελλάδα, ἄνθρωπος",
    "Съешь же ещё этих мягких французских булок. 我能吞下玻璃而不伤身体。いろはにほへと 다람쥐",
]


@cache
def lines() -> list[str]:
    """Prose of the packaged corpus, and a little of all else."""
    stories = (REPOSITORY / "train" / "corpus" / "stories.txt").read_text().splitlines()[:800]
    return [*stories, *(4 * _CODE)]


def texts(count: int = 1500, seed: int = 0) -> list[str]:
    """Lines, words and noise: any alphabet, any code point, runs of spaces, the empty text."""
    draw = random.Random(seed)
    prose = lines()
    found = ["", " ", "   ", "\n", "▁", "< s>x", "\n".join(prose[:200])]
    found += [
        f"{a}{' ' * n}{b}" for n in range(1, 40) for a, b in (("", ""), ("a", "b"), ("", "x"))
    ]
    for _ in range(count):
        kind = draw.random()
        if kind < 0.3:
            found.append(draw.choice(prose))
        elif kind < 0.7:
            length = draw.randrange(1, 50)
            found.append("".join(draw.choice(draw.choice(_ALPHABETS)) for _ in range(length)))
        elif kind < 0.9:
            words = [
                "".join(draw.choice(_ALPHABETS[draw.choice([0, 0, 1, 4, 6])]) for _ in range(6))
                for _ in range(draw.randrange(1, 12))
            ]
            found.append(" ".join(words))
        else:
            numbers = (draw.randrange(1, draw.choice([0x500, 0x3000, 0x20000])) for _ in range(30))
            found.append("".join(chr(n) for n in numbers if not 0xD800 <= n < 0xE000))
    return found


def train(**options: Any) -> bytes:
    """A small model, by sentencepiece's own trainer."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "model_type": "unigram",
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def written(raw: bytes, folder: Path) -> TokenizerFiles:
    """What moeconv makes of a model."""
    path = folder / "small.model"
    path.write_bytes(raw)
    return read_tokenizer(str(path), model_max_length=None)


def apart(tokenizer: TokenizerFiles, raw: bytes, corpus: list[str]) -> list[tuple[str, Any, Any]]:
    """Texts with other ids than sentencepiece's, or that come back as another text."""
    ours = Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    ours.encode_special_tokens = True  # to sentencepiece their names are a text
    found = []
    for text in (*corpus, "<s> a </s><unk>", "<pad>", "<bos>x", "<0x41> <0x0A>"):
        ids, wanted = ours.encode(text, add_special_tokens=False).ids, theirs.encode(text)
        if ids != wanted:
            pieces = [[theirs.id_to_piece(i) for i in both] for both in (ids, wanted)]
            found.append((text, *pieces))
        elif theirs.unk_id() not in ids and ours.decode(ids) != theirs.decode(ids):
            found.append((text, ours.decode(ids), theirs.decode(ids)))
    return found
