"""MaxText's log as it comes out of whatever stood between MaxText and the file."""

import gzip
import json

import pytest
import synthetic
from engine_lab import tensors
from inputs_lab import log_of, resolved_config, warnings

from moeconv.arch.config_file import load_config_file
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import ConfigError
from moeconv.maxtext.checkpoint import open_checkpoint

PREFIX = "I1126 07:19:42.123456 140000 pyconfig.py:591] "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("made") / "run")


def rows(made, **changes):
    return log_of(resolved_config(made, **changes), "").splitlines()


def each(form):
    """A file of records, one for each line of the log."""
    return lambda lines: "".join(form(line) for line in lines)


def pairs(lines):
    return [" ".join(lines[n : n + 2]) for n in range(0, len(lines), 2)]


def progress(lines):
    """As tqdm writes between them."""
    return "\r".join(f" {n}%|##  | {n}/99 [00:01<00:09]\r{line}\n" for n, line in enumerate(lines))


# How the lines of a log may be in a file.
FORMS = {
    "Cloud Logging": each(
        lambda line: json.dumps({"severity": "INFO", "textPayload": line}) + "\n"
    ),
    "a structured record": each(
        lambda line: json.dumps({"jsonPayload": {"message": line, "n": {"m": ["x"]}}}) + "\n"
    ),
    "msg": each(lambda line: json.dumps({"level": "info", "msg": line + "\n"}) + "\n"),
    "Docker": each(lambda line: json.dumps({"log": line + "\n", "stream": "stderr"}) + "\n"),
    "JSON in JSON": each(
        lambda line: json.dumps({"log": json.dumps({"message": line}) + "\n"}) + "\n"
    ),
    "JSON behind a prefix": each(
        lambda line: f"2026-11-26T07:19:42Z stdout F {json.dumps({'message': line})}\n"
    ),
    "an array of records": lambda lines: json.dumps([{"textPayload": x} for x in lines], indent=2),
    "an array in one line": lambda lines: json.dumps([{"textPayload": x} for x in lines]),
    "all in one record": lambda lines: json.dumps({"log": "\n".join(lines)}) + "\n",
    "a notebook": lambda lines: json.dumps({"text": [x + "\n" for x in lines]}, indent=1),
    "logfmt": each(lambda line: f"time=07:19 level=info msg={json.dumps(line)} host=a\n"),
    "CSV": each(lambda line: f'7,INFO,"{line}"\n'),
    "Kubernetes": each(lambda line: f"[pod/maxtext-0-4xk/train] 2026-11-26T07:1 {line}\n"),
    "CRI": each(lambda line: f"2026-11-26T07:19:42.123456789Z stderr F {line}\n"),
    "two on a line": lambda lines: "\n".join(pairs(lines)) + "\n",
    "two on a line, with a prefix": lambda lines: (
        "\n".join(pairs([PREFIX + line for line in lines])) + "\n"
    ),
    "two on a line, run together": lambda lines: (
        "\n".join("".join(lines[n : n + 2]) for n in range(0, len(lines), 2)) + "\n"
    ),
    "CRLF": lambda lines: "\r\n".join([*lines, ""]),
    "CR": lambda lines: "\r".join([*lines, ""]),
    "tqdm": progress,
    "BOM": lambda lines: "\ufeff" + "\n".join([*lines, ""]),
    "rich": each(lambda line: f"[07:19:42] INFO     {line:<60}   pyconfig.py:591\n"),
    "bytes": each(lambda line: f"(worker) b{line + chr(10)!r}\n"),
    "a terminal": lambda lines: (
        "Script started\r\n\x1b[?2004h$ \x1b]0;train\x07" + "\r\n".join([*lines, "\x1b(B"])
    ),
    "colours": each(lambda line: f"\x1b[32m{line}\x1b[0m\n"),
    "a value on the next line": each(lambda line: line.replace(": ", ":\n    ", 1) + "\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_setting_of_a_log_is_read(tmp_path, made, form):
    plain = tmp_path / "plain.log"
    plain.write_text(log_of(resolved_config(made)))
    path = tmp_path / "train.log"
    with path.open("w", newline="") as file:
        file.write(FORMS[form](rows(made)))
    found, wanted = load_config_file(path), load_config_file(plain)
    assert found.resolved and found.whole and not found.twice
    assert dict(found) == dict(wanted)
    assert open_checkpoint(str(made.run), config=path).resolution.model().rope_theta == 500_000


ENCODINGS = {"utf-16": "UTF-16", "utf-16-le": "without a mark", "utf-16-be": "", "utf-32": ""}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["log", "yml"])
def test_an_encoding_is_recognised(tmp_path, made, encoding, kind):
    text = log_of(resolved_config(made), "│ ") if kind == "log" else "decoder_block: mixtral\n"
    path = tmp_path / f"run.{kind}"
    path.write_bytes(text.encode(encoding))
    assert load_config_file(path)["decoder_block"] == "mixtral"


def test_a_packed_log_is_read(tmp_path, made):
    path = tmp_path / "train.log.gz"
    content = gzip.compress(log_of(resolved_config(made)).encode())
    path.write_bytes(content)
    assert open_checkpoint(str(made.run), config=path).resolution.model()
    for damaged, words in (
        (content[:-9], "packed by gzip, and cut off"),
        (content[:200] + bytes(50) + content[250:], "packed by gzip, and damaged"),
        (b"\xfd7zXZ\0" + content, "packed by xz; unpack it first"),
        (b"PK\x03\x04" + content, "packed by zip; unpack it first"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"train.log.gz.*it is {words}"):
            open_checkpoint(str(made.run), config=path)


def test_a_packed_bomb_ends(tmp_path, made):
    path = tmp_path / "train.log.gz"
    path.write_bytes(gzip.compress(gzip.compress(bytes(2**26))) + gzip.compress(bytes(2**26)))
    with pytest.raises(ConfigError, match="is not YAML of MaxText"):
        open_checkpoint(str(made.run), config=path)


@pytest.mark.parametrize("last", ["rope_max_timescale: 5000", "decoder_block: mixt"])
def test_a_value_that_the_end_of_the_file_cuts_is_asked_for(tmp_path, made, last):
    key, _, _ = last.partition(":")
    path = tmp_path / "train.log"
    lines = [line for line in rows(made) if f"param {key}:" not in line]
    path.write_text("\n".join([*lines, f"Config param {last}"]))
    opened = open_checkpoint(str(made.run), config=path)
    assert key in opened.resolution.missing
    [said] = [each for each in warnings(opened) if "is left out, as its value is cut off" in each]
    assert said.startswith(f"{path}:{len(lines) + 1}: {key}")
    path.write_text("\n".join([*lines, f"Config param {key}: {made.config[key]}", ""]))
    assert open_checkpoint(str(made.run), config=path).resolution.model()


@pytest.mark.parametrize("width", range(36, 44))
def test_values_that_the_width_of_all_lines_cuts_are_asked_for(tmp_path, made, width):
    """As `cut -c1-40` does; of `Config param rope_max_timescale: 500000` the 39th is the last."""
    path = tmp_path / "train.log"
    config = resolved_config(made, logical_axis_rules=[["a", "b"]] * 20, num_experts_per_tok=...)
    lines = [line[:width].rstrip() for line in log_of(config, "").splitlines()]
    path.write_text("\n".join([*lines, "Config param num_experts_per_tok: 2", ""]))
    opened = open_checkpoint(str(made.run), config=path)
    assert ("rope_max_timescale" in opened.resolution.missing) == (width <= 39)
    assert "num_experts_per_tok" not in opened.resolution.missing
    if width > 39:
        assert opened.resolution.known["rope_theta"] == 500_000


def test_a_text_that_begins_like_a_list_cuts_nothing(tmp_path, made):
    path = tmp_path / "train.log"
    path.write_text(log_of(resolved_config(made, run_name="[first try")))
    opened = open_checkpoint(str(made.run), config=path)
    assert opened.resolution.model() and warnings(opened) == ()


@pytest.mark.parametrize("last", ["use_qk_norm: False", "attn_logits_soft_cap: None"])
def test_a_value_that_can_not_go_on_is_whole(tmp_path, made, last):
    path = tmp_path / "train.log"
    path.write_text("\n".join([*rows(made), f"Config param {last}"]))
    opened = open_checkpoint(str(made.run), config=path)
    assert opened.resolution.model() and warnings(opened) == ()


def test_a_second_run_that_the_end_of_the_file_cuts_is_not_the_first(tmp_path, made):
    path = tmp_path / "train.log"
    path.write_text("\n".join([*rows(made), "Config param rope_max_timescale: 100"]))
    opened = open_checkpoint(str(made.run), config=path)
    assert opened.resolution.missing == ("rope_max_timescale",)


@pytest.mark.parametrize("key", ["rope_max_timescale", "rope_type", "num_experts_per_tok"])
def test_a_line_that_was_lost_is_asked_for(tmp_path, made, key):
    """Not taken to be MaxText's default: each release logs it."""
    path = tmp_path / "train.log"
    path.write_text(log_of(resolved_config(made, **{key: ...})))
    assert key in open_checkpoint(str(made.run), config=path).resolution.missing


def test_lists_over_several_lines(tmp_path, made):
    path = tmp_path / "train.log"
    lines = log_of(resolved_config(made, mlp_activations=...)).rstrip()
    rest = "Config param mlp_activations: ['silu',\n    'linear'\n    ]\nI1126 more\n"
    path.write_text(f"{lines}\n{rest}")
    found = load_config_file(path)
    assert found["mlp_activations"] == ["silu", "linear"]
    assert open_checkpoint(str(made.run), config=path).resolution.model()
    path.write_text(f"{lines}\nConfig param mlp_activations: ['silu',\nI1126 more\n")
    opened = open_checkpoint(str(made.run), config=path)
    assert "mlp_activations" in opened.resolution.missing
    assert any("mlp_activations is left out" in each for each in warnings(opened))


@pytest.mark.parametrize(
    ("text", "value"),
    [("None", None), ("True", True), ("gs://a/b: c", "gs://a/b: c"), ("'a: b'", "a: b"), ("", ""),
     ("1e-05", 1e-5), ("{'a': ['b: c']}", {"a": ["b: c"]}), ("DecoderBlock.X", "DecoderBlock.X"),
     ("((1, 2), ('a', None))", ((1, 2), ("a", None))), ("a Config param", "a Config param")],
)  # fmt: skip
def test_values_of_every_kind(tmp_path, text, value):
    path = tmp_path / "train.log"
    path.write_text(f"{PREFIX}Config param a_b: {text}\n{PREFIX}Config param rope_type: default\n")
    assert dict(load_config_file(path)) == {"a_b": value, "rope_type": "default"}


def test_a_line_that_is_too_long_is_named(tmp_path, made):
    path = tmp_path / "train.log"
    path.write_text("x" * 5 * 2**20 + "\n" + log_of(resolved_config(made)))
    assert open_checkpoint(str(made.run), config=path).resolution.model()
    path.write_text(json.dumps({"log": "Config param a: " + "x" * 5 * 2**20}))
    with pytest.raises(ConfigError, match=r"train.log: line 1 has settings and is longer"):
        open_checkpoint(str(made.run), config=path)


def test_a_dtype_that_changes_no_model_may_differ(tmp_path, made):
    path = tmp_path / "train.log"
    logs = [log_of(resolved_config(made, dtype=dtype)) for dtype in ("bfloat16", "float32")]
    path.write_text("".join(logs))
    assert open_checkpoint(str(made.run), config=path).resolution.model()


def test_no_secret_of_a_log_is_copied(tmp_path, made):
    secrets = ["hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "wandb-local-0123456789abcdef", "s3cr3t-p4ss"]
    config = resolved_config(
        made, hf_access_token=secrets[0], wandb_project_name=secrets[1],
        base_output_directory=f"gs://me:{secrets[2]}@bucket", run_name=secrets[1],
    )  # fmt: skip
    path = tmp_path / "train.log"
    path.write_text(f"export WANDB_API_KEY={secrets[1]}\n" + log_of(config))
    out = tmp_path / "out"
    convert(plan_conversion(str(made.run), ConvertOptions(config=path)), out)
    assert tensors(out)
    for file in out.iterdir():
        assert not [each for each in secrets if each.encode() in file.read_bytes()], file.name
