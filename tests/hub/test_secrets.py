"""Secrets of every maker are found in whatever is sent, and real tokenizers hold none."""

import base64
import importlib.util
import json
import struct
import zlib
from pathlib import Path
from urllib.parse import quote

import pytest

from moeconv.errors import OutputError
from moeconv.hub.kinds import unlike
from moeconv.hub.local import File
from moeconv.hub.public import demand_sendable
from moeconv.hub.secrets import find_secret, own_values

MIXED = "aB3d" * 12  # made up, as all of these
SECRETS = {
    "hugging face": f"hf_{MIXED[:34]}",
    "hugging face, of an organization": f"api_org_{MIXED[:34]}",
    "github": f"ghp_{MIXED[:36]}",
    "github app": f"ghs_{MIXED[:36]}",
    "github, fine-grained": f"github_pat_{MIXED}_{MIXED}",
    "gitlab": f"glpat-{MIXED[:20]}",
    "gitlab runner": f"glrt-{MIXED[:20]}",
    "openai": f"sk-{MIXED}",
    "openai project": f"sk-proj-{MIXED}-{MIXED}",
    "anthropic": f"sk-ant-api03-{MIXED}-{MIXED}AA",
    "aws id": "AKIA" + "ABCDEFGHIJKLMNOP",
    "aws id for a while": "ASIA" + "ABCDEFGHIJKLMN23",
    "aws key": f"aws_secret_access_key = {MIXED[:40]}",
    "aws key of json": json.dumps({"SecretAccessKey": f"{MIXED[:36]}+/{MIXED[:2]}"}),
    "google": f"AIza{MIXED[:35]}",
    "google oauth": f"ya29.{MIXED}",
    "google service account": json.dumps({"type": "service_account", "project_id": "x"}),
    "slack": "xoxb-" + "123456789012-abcdefABCDEF",
    "slack app": "xapp-" + "1-A01234567-123456789012-abcdef",
    "npm": f"npm_{MIXED[:36]}",
    "npmrc": f"//registry.example.org/:_authToken={MIXED}",
    "pypi": f"pypi-AgEIcHlwaS5vcmc{MIXED}",
    "rsa": "-----BEGIN RSA PRIVATE KEY-----\nMII",
    "pkcs8": "-----BEGIN PRIVATE KEY-----",
    "pkcs8, encrypted": "-----BEGIN ENCRYPTED PRIVATE KEY-----",
    "openssh": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "pgp": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "ssh2": "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----",
    "putty": "PuTTY-User-Key-File-3: ssh-ed25519",
    "wandb in a netrc": "machine api.wandb.ai\n  login user\n  password " + "0a1b" * 10,
    "wandb variable": "WANDB_API_KEY: " + "0a1b" * 10,
    "wandb login": "$ wandb login " + "0a1b" * 10,
    "wandb in python": f"wandb.login(key='{MIXED + MIXED[:38]}')",
    "netrc": "machine github.com login ann password hunter",
    "netrc, the other way": "machine github.com password hunter login ann",
    "pgpass": "db.example.org:5432:*:ann:hunter2!",
    "jwt": f"eyJ{MIXED[:20]}.eyJ{MIXED[:20]}.{MIXED[:20]}",
    "stripe": f"sk_live_{MIXED[:24]}",
    "sendgrid": f"SG.{MIXED[:22]}.{MIXED[:43]}",
    "azure": f"AccountName=x;AccountKey={MIXED}{MIXED[:38]}==;EndpointSuffix=core",
    "azure sas": f"https://x.blob.core.windows.net/c?sv=2024&sig={MIXED}%3D",
    "kaggle": '{"username":"ann","key":"' + "0a1b" * 8 + '"}',
    "address with a password": "https://ann:pa55word@example.net/x.git",
    "shadow": f"root:$6$abcdefgh${MIXED}",
    "token variable": "export MY_TOKEN=abcdefgh1234",
    "secret variable": "CLIENT_SECRET='abcdefghijk1'",
    "access key variable": "S3_ACCESS_KEY=abcdefghijk1",
    "a second variable": "MY_TOKEN_2=abcdefgh1234",
    "password variable": "DB_PASSWORD=correcthorse",
    "password setting": 'password: "correct-horse-battery"',
    "secret setting": '"client_secret": "abcDEF1234567890"',
    "escaped": "\\u0068f_" + MIXED[:34],
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_found_and_not_repeated(case):
    secret = SECRETS[case]
    within = f'"Ġx":1,{secret} ' if case != "pgpass" else f'"{secret}"'  # which begins its line
    for content in (secret, f"before\n{secret}\nafter", within):
        assert find_secret(content.encode()) is not None
    assert find_secret(f"\ufeff{secret}".encode("utf-16")) is not None
    kind = find_secret(secret.encode())
    assert secret[-8:] not in kind


@pytest.mark.parametrize("escape", ["\\n", "\\t", "\\r", "\\b", "\\f", "\\/", '\\"', "\\u000a"])
def test_a_secret_behind_an_escape_of_json_is_found(escape):
    for secret in (f"hf_{MIXED[:34]}", "machine github.com login ann password hunter"):
        text = f'{{"a": "word{escape}{secret}"}}'
        for content in (text, json.dumps(text), json.dumps(json.dumps(text))):
            assert find_secret(content.encode()) is not None


HARMLESS = [
    "export HF_TOKEN=your_token_here",
    "HF_TOKEN=$MY_TOKEN_VARIABLE",
    "HF_TOKEN=hf_...",
    'token = os.environ["HF_TOKEN"]',
    'API_KEY=os.environ["API_KEY_NAME"]',
    "PAD_TOKEN = tokenizer.eos_token",
    "MASK_TOKEN_ID=1234567890",
    '"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token_id": 128001',
    '"password":123456,"token":99999,"secret":54321',
    "the default password is printed; machine with password protection",
    "sk-learn, risk-based, a task-oriented-dialogue-benchmark-version-20",
    "see https://huggingface.co:443/x@y, mailto:ann@example.org",
    "commit 0123456789abcdef0123456789abcdef01234567 of wandb",
    "12:34:56:78 and fe80::1:12:ab",
    "max_new_tokens=64, skip_special_tokens=True, token: the next of 512 tokens",
    '"hf_token": null',
    "MAX_TOKENS = 10_000_000",
    "TOKENIZER_PATH=/data/tok123456789",
    "TOKEN=/data/secrets/token1",
    "TOKENIZER=meta-llama/Llama-3.1-8B",
    "NUM_TOKENS = len(tokens)",
    "TOTAL_TOKENS = batch_size * seq",
    'PAD_TOKEN = "[PAD_TOKEN]"',
    "EOS_TOKEN=<|end_of_text_1|>",
    "IMAGE_TOKEN=image_token_123",
    "IMAGE_TOKEN_INDEX=-200000000",
    "OPENAI_API_KEY=token-abc123",
    "see 10:20:Mark:verse:text",
    "http://127.0.0.1:8000:x:y:zzzz",
    "sha256 " + "0a1b2c3d" * 8,
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_pass(text):
    assert find_secret(text.encode(), own_values({"X_TOKEN": "short", "HF_HOME": "a" * 20})) is None


def tokenizers() -> list[Path]:
    """Of those that MaxText ships: a sentencepiece model, and 150,000 tokens and merges of BPE."""
    (package,) = importlib.util.find_spec("maxtext").submodule_search_locations
    folder = Path(package) / "assets" / "tokenizers"
    names = ("tokenizer.mistral-v3", "qwen3-tokenizer/tokenizer.json")
    return [folder / name for name in names]


@pytest.mark.skipif(importlib.util.find_spec("maxtext") is None, reason="needs MaxText's files")
def test_tokenizers_of_real_models_pass():
    for path in tokenizers():
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        demand_sendable([File.of(name, path.read_bytes())], {"X_TOKEN": MIXED})


SPELLINGS = {
    "as it is": lambda value: value,
    "json": lambda value: json.dumps(value)[1:-1],
    "address": lambda value: quote(value, safe=""),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "base64, in a longer one": lambda value: base64.b64encode(f"user:{value}!".encode()).decode(),
    "base64 for addresses": lambda value: base64.urlsafe_b64encode(f"u{value}".encode()).decode(),
    "hexadecimal": lambda value: value.encode().hex(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_this_process_s_own_secrets_are_found_however_they_are_written(spelling):
    own = own_values({"WANDB_API_KEY": 'o/wn+?>"secret~~'})
    text = f"a {SPELLINGS[spelling]('o/wn+?>"secret~~')} b"
    assert find_secret(text.encode(), own) is not None
    assert find_secret(text.encode(), own_values({"PATH": 'o/wn+?>"secret~~'})) is None


def test_the_stored_token_is_one_of_them(monkeypatch):
    monkeypatch.setattr("moeconv.hub.secrets.get_token", lambda: "a-token-of-no-form")
    assert find_secret(b"x a-token-of-no-form y", own_values({})) is not None


def test_names_of_variables_and_values_that_are_none():
    paths = {"MY_TOKEN_PATH": str(Path.home()), "GIT_AUTHOR_NAME": "Ann Lee Somebody"}
    words = {"TOKENIZERS_PARALLELISM": "false", "DB_PASSWORD": "password", "PIN_TOKEN": "12345678"}
    assert own_values({**paths, **words}) == own_values({})


# What each kind of file must be ------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(*, before: bytes = b"", rows: bytes = b"\0\1" * 2, behind: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 2, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + chunk(b"IEND", b"") + behind


def wide_png(row: bytes) -> bytes:
    """Some bytes as the gray pixels of one row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(row), 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


UNLIKE = {
    "text as a picture": ("a.png", b"machine x login y"),
    "something behind the picture": ("a.png", png(behind=b"x")),
    "two pictures": ("a.png", png(behind=png())),
    "cut off": ("a.png", png()[:-3]),
    "an unknown part": ("a.png", png(before=chunk(b"exIf", b"x"))),
    "a part with more than it may hold": ("a.png", png(before=chunk(b"pHYs", b"x" * 40))),
    "a palette": ("a.png", png(before=chunk(b"PLTE", b"x" * 40))),
    "a damaged part": ("a.png", png().replace(b"IDAT", b"IDAT\0", 1)),
    "other pixels": ("a.png", png(rows=b"\0\1" * 3)),
    "behind the pixels": ("a.png", png().replace(
        chunk(b"IDAT", zlib.compress(b"\0\1" * 2)),
        chunk(b"IDAT", zlib.compress(b"\0\1" * 2) + b"secret"))),
    "a text as a model": ("tokenizer.model", b"machine x login y password z"),
    "nothing as a model": ("tokenizer.model", b""),
    "a key as a config": ("config.json", b"\x00\x01\x02"),
    "a list as a config": ("vocab.json", b"[1, 2]"),
    "not a number": ("tokenizer_config.json", b'{"a": NaN}'),
    "bytes as merges": ("merges.txt", b"\xff\xfe"),
    "zeros as merges": ("merges.txt", b"a\0b"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_what_is_not_what_its_name_says_is_not_sent(case):
    name, content = UNLIKE[case]
    assert unlike(name, content) is not None
    with pytest.raises(OutputError, match=name):
        demand_sendable([File.of(name, content)], {})


def test_a_picture_s_texts_are_looked_through():
    key = f"hf_{MIXED[:34]}".encode()
    assert unlike("a.png", png()) is None
    demand_sendable([File.of("a.png", png())], {})
    for part in (
        chunk(b"tEXt", b"Software\0" + key),
        chunk(b"zTXt", b"Software\0\0" + zlib.compress(key)),
        chunk(b"iTXt", b"Software\0\1\0en\0\0" + zlib.compress(key)),
        wide_png(key),
    ):
        picture = part if part.startswith(b"\x89PNG") else png(before=part)
        with pytest.raises(OutputError, match="access key") as caught:
            demand_sendable([File.of("a.png", picture)], {})
        assert key.decode() not in str(caught.value)
