"""What others wrote is no JSON, or does not fit into any: found before the work, never after it."""

import json

import pytest
import synthetic
from cli_runner import moeconv

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import ConfigError, TokenizerError
from moeconv.maxtext import run_record
from moeconv.untrusted import strict_json

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<s>": 2}, "merges": []},
    "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
}


@pytest.fixture
def made(tmp_path):
    return synthetic.write(tmp_path / "run", step=9)


def sidecar(made, text="", **more):
    """Writes it; `text` replaces a placeholder, for what json.dumps would not write."""
    content = {"format": "moeconv-run", "version": 1, "config": dict(made.config), **more}
    raw = json.dumps(content).replace('"HERE"', text)
    (made.run / "moeconv_run.json").write_text(raw, encoding="utf-8", errors="surrogatepass")


@pytest.mark.parametrize(
    ("text", "words"),
    [("NaN", "holds NaN"), ("-Infinity", "holds -Infinity"), ("1e999", "which no double can hold"),
     ('"\\ud800"', "half a character"), ("[" * 9_000 + "]" * 9_000, "nested too deeply"),
     ("1" * 5_000, "digits")],
    ids=["nan", "inf", "1e999", "surrogate", "deep", "long"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["config", "run", "beside"])
def test_a_sidecar_that_is_no_json(made, tmp_path, place, text, words):
    more = {
        "config": {"config": {**made.config, "learning_rate": "HERE"}},
        "run": {"run": {"license": "HERE"}},
        "beside": {"versions": "HERE"},
    }[place]
    sidecar(made, text, **more)
    ran = moeconv("convert", made.run, tmp_path / "out")
    assert ran.code == ConfigError.exit_code
    assert "moeconv_run.json is not the sidecar that moeconv train writes" in ran.error
    assert words in ran.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("epochs", ['"Infinity"', '"nan"'])
def test_a_fact_that_only_pydantic_takes_for_a_number(made, tmp_path, epochs):
    sidecar(made, epochs, run={"epochs": "HERE"})
    ran = moeconv("convert", made.run, tmp_path / "out")
    assert ran.code == ConfigError.exit_code
    assert "run.epochs: Input should be a finite number" in ran.error


def test_losses_beyond_a_double_and_lines_that_are_none(made, tmp_path):
    sidecar(made)
    lines = [
        *(f'{{"kind": "train", "step": {n}, "loss": 1.7e308}}' for n in range(1, 5)),
        '{"kind": "train", "step": 6, "loss": NaN}',
        '{"kind": "train", "step": 6, "loss": "Infinity"}',
        '{"kind": "train", "step": 6, "loss": 1e999}',
        '{"kind": "train", "step": 6, "loss": 1, "note": "\\ud800"}',
        "[" * 9_000,
        '{"kind": "train", "step": 6, "loss": 1, "note": "' + "x" * 100_000 + '"}',
        "null",
    ]
    (made.run / "metrics.jsonl").write_text("\n".join(lines))
    points = [run_record._Point("train", n, 1.7e308, None) for n in range(4)]
    assert run_record._mean(points).loss == 1.7e308
    manifest = convert(plan_conversion(str(made.run), ConvertOptions()), tmp_path / "out")
    content = strict_json.loads((tmp_path / "out" / "moeconv_manifest.json").read_bytes())
    assert [p["loss"] for p in content["run"]["train_curve"]] == [1.7e308] * 4
    assert any(w.startswith("7 lines of the run's metrics.jsonl") for w in manifest.warnings)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer_config.json", '{"bos_token": "<s>", "x": NaN}'),
     ("tokenizer_config.json", '{"bos_token": "<s>", "x": "\\ud800"}'),
     ("special_tokens_map.json", '{"x": Infinity}'), ("chat_template.json", '{"x": "\\udfff"}'),
     ("tokenizer.json", json.dumps(TOKENIZER).replace('"BPE"', '"\\ud800"'))],
)  # fmt: skip
def test_a_tokenizer_that_is_no_json(made, tmp_path, name, text):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / name).write_text(text)
    sidecar(made)
    ran = moeconv("convert", made.run, tmp_path / "out", "--tokenizer", folder)
    assert ran.code == TokenizerError.exit_code
    assert f"{name} is not JSON (it holds" in ran.error
    assert not (tmp_path / "out").exists()


def test_the_same_bytes_for_what_is_json(made, tmp_path):
    """As json.dumps writes it: é as it is, an indent of two, a line's end."""
    sidecar(made, run={"license": "é", "epochs": 1.5})
    convert(plan_conversion(str(made.run), ConvertOptions()), tmp_path / "out")
    for name in ("moeconv_manifest.json", "config.json", "generation_config.json"):
        raw = (tmp_path / "out" / name).read_bytes()
        text = json.dumps(json.loads(raw), indent=2, ensure_ascii=False) + "\n"
        assert raw == text.encode(), name
