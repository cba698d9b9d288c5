"""Wrong input of `moeconv data prepare` is one sentence, and leaves nothing."""

import gzip
import os

import cli_runner
import pytest
from data_lab import STORIES, jsonl
from moeconv_train.data import PrepareOptions, prepare_dataset

from moeconv.errors import UsageError

pytest.importorskip("array_record")

WRONG = [
    (["absent.jsonl"], 2, "absent.jsonl: no such file or folder; give one"),
    (["absent"], 10, "absent: no such file or folder, and with HF_HUB_OFFLINE set"),
    (["{dir}/empty"], 2, "has no parquet, jsonl or text file to train on"),
    (["{dir}/notes.md"], 2, "is no parquet, jsonl or text file by its name"),
    (["{dir}/a.jsonl", "--column", "story"], 2, "line 1 is no object with a text 'story'; name"),
    (["{dir}/number.jsonl"], 2, "line 1 is no object with a text 'text'"),
    (["{dir}/broken.jsonl.gz"], 2, "cannot be read as json"),
    (["{dir}/latin.txt"], 2, "cannot be read as text"),
    (["{dir}/broken.parquet"], 2, "cannot be read as parquet"),
    (["{dir}/blank.jsonl"], 2, "holds no story to train on"),
    (["{dir}/array.jsonl"], 2, "array.jsonl: line 1 is no object with a text 'text'"),
    (["{dir}/number.parquet"], 2, "has no column 'text' of text; name one of title with --column"),
    (["{dir}/notes.txt", "--separator", ""], 2, "the argument after --separator is empty"),
    (["{dir}/deep.jsonl"], 2, "deep.jsonl: line 1 is not JSON"),
    (["{dir}/broken.jsonl.zst"], 2, "cannot be read as json"),
    (["{dir}/fifo"], 2, "fifo/train.jsonl: is a FIFO, device or socket, not a regular file"),
    (["{dir}/links"], 2, "links/train.txt: is a link that leads out of"),
    (["{dir}/fifo/train.jsonl"], 2, "fifo/train.jsonl: is a FIFO, device or socket"),
    (["{dir}/a.jsonl", "--tokenizer", "{dir}/empty"], 8, "has no tokenizer.json"),
]


@pytest.mark.parametrize(("args", "code", "message"), WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    tmp_path, tokenizer, args, code, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    jsonl(source / "a.jsonl", STORIES[:5])
    (source / "notes.md").write_text("x")
    (source / "notes.txt").write_text("x")
    (source / "number.jsonl").write_text('{"text": 5}\n')
    (source / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:40])
    (source / "array.jsonl").write_text('[{"text": "a"}]')
    (source / "deep.jsonl").write_text("[" * 100_000)
    (source / "broken.jsonl.zst").write_bytes(b"(\xb5/\xfd and no more")
    for folder in ("fifo", "links"):
        (source / folder).mkdir()
    os.mkfifo(source / "fifo" / "train.jsonl")
    (source / "links" / "train.txt").symlink_to(__file__)
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "broken.parquet").write_bytes(b"PAR1 and no more")
    (source / "blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    if "parquet" in args[0]:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pa.table({"text": [5], "title": ["x"]})
        parquet.write_table(table, source / "number.parquet")
    words = [word.replace("{dir}", str(source)) for word in args]
    if "--tokenizer" not in words:
        words += ["--tokenizer", str(tokenizer)]
    ran = cli_runner.moeconv("data", "prepare", *words, "--out", tmp_path / "out")
    assert ran.code == code, ran.err
    assert message in ran.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_file_that_is_not_there_is_the_command_lines_mistake(tmp_path):
    for name in ("stories.jsonl", str(tmp_path / "stories")):
        with pytest.raises(UsageError, match="no such file or folder; give one"):
            prepare_dataset(name, tmp_path / "out", PrepareOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--seq-length", 1), ("--validation-fraction", 1)])
def test_the_option_that_is_wrong_is_named(tmp_path, option, value):
    ran = cli_runner.moeconv("data", "prepare", "x.txt", "--out", tmp_path / "out", option, value)
    assert ran.code == UsageError.exit_code
    assert f"Invalid value for '{option}': {value}" in ran.err
