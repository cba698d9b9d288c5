"""Further chat templates of a tokenizer are not copied, and that is said."""

import outputs

from moeconv.hf.tokenizer import read_tokenizer
from moeconv.maxtext.checkpoint import find_sidecar, run_tokenizer
from moeconv.orbax.locate import locate


def test_they_are_named(tmp_path):
    run = outputs.write_run(tmp_path / "run")
    templates = run / "tokenizer" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    sidecar = find_sidecar(locate(str(run)), needed=True)
    for found in (
        read_tokenizer(str(run / "tokenizer"), model_max_length=None),
        run_tokenizer(sidecar, model_max_length=None),
    ):
        [note] = [n for n in found.notes if "not copied" in n]
        assert "tool_use.jinja of additional_chat_templates" in note
        assert "tool_use.jinja" not in found.files
