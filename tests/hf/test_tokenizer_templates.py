"""Further chat templates of a tokenizer are taken over, in a form that transformers 4 reads too."""

import json

import outputs
import pytest
from tokenizer_lab import refused, write
from transformers import AutoTokenizer

from moeconv.hf.tokenizer import read_tokenizer
from moeconv.maxtext.checkpoint import find_sidecar
from moeconv.maxtext.tokenizer import run_tokenizer
from moeconv.orbax.locate import locate

USER = [{"role": "user", "content": "hello"}]
DEFAULT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def further(folder, **templates):
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)


def rendered(folder, name=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(USER, chat_template=name, tokenize=False)


@pytest.mark.parametrize("where", ["file", "config"])
def test_they_load_as_they_did(saved, tmp_path, where):
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    path = saved / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    if where == "file":
        (saved / "chat_template.jinja").write_text(DEFAULT)
    else:
        config["chat_template"] = DEFAULT
    path.write_text(json.dumps(config))
    further(saved, tool_use="tools: " + DEFAULT, rag="rag: " + DEFAULT)
    found = read_tokenizer(str(saved), model_max_length=None)
    out = write(found, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert rendered(out) == "hello"
    for name in ("tool_use", "rag"):
        assert rendered(out, name) == rendered(saved, name)
    [note] = [n for n in found.notes if "additional_chat_templates" in n]
    assert "rag.jinja, tool_use.jinja" in note
    again = read_tokenizer(str(out), model_max_length=None)
    assert again.files == found.files


def test_of_a_run(tmp_path):
    run = outputs.write_run(tmp_path / "run")
    further(run / "tokenizer", tool_use="{{ messages }}")
    sidecar = find_sidecar(locate(str(run)), needed=True)
    found = run_tokenizer(sidecar, model_max_length=None)
    listed = json.loads(found.files["tokenizer_config.json"])["chat_template"]
    assert {"name": "tool_use", "template": "{{ messages }}"} in listed


def test_what_is_none(saved, tmp_path):
    further(saved, one="x")
    (saved / "additional_chat_templates" / "one.jinja").write_bytes(b"\xff")
    assert "additional_chat_templates/one.jinja is not UTF-8" in refused(saved)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (saved / "additional_chat_templates" / "one.jinja").unlink()
    (saved / "additional_chat_templates" / "one.jinja").symlink_to(secret)
    assert "leads out of" in refused(saved)
