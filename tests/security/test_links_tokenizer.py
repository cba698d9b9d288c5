"""The tokenizer, the samples and the metrics of a run are the run's: nothing else gets into OUT."""

import json
import os
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import outputs
import planted
import pytest
from cli_runner import Ran, moeconv

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import TOKENIZER_FILES, read_tokenizer
from moeconv.maxtext.sidecar import FoundSidecar, RunSidecar
from moeconv.maxtext.tokenizer import run_tokenizer
from moeconv.orbax.locate import locate
from moeconv.orbax.store import Folder
from moeconv.verification.checks import Status
from moeconv.verification.levels.tokenizers import check_own_tokenizer
from moeconv.verification.measure.tokens import find_sample


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = outputs.write_run(tmp_path_factory.mktemp("made") / "run")
    for name in ("merges.txt", "vocab.json", "vocab.txt", "chat_template.jinja"):
        (run / "tokenizer" / name).write_text("{}")
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def _convert(run: Path, *args: object) -> Ran:
    with planted.at_once():
        return moeconv("convert", run, run.parent / "out", *args)


def _tell(run: Path, tokenizer: object, **more: object) -> None:
    sidecar = json.loads((run / "moeconv_run.json").read_text())
    (run / "moeconv_run.json").write_text(json.dumps({**sidecar, "tokenizer": tokenizer, **more}))


def _refused(ran: Ran, run: Path, outside: planted.Outside, *words: str) -> None:
    assert ran.code == TokenizerError.exit_code, ran
    assert all(word in ran.error for word in words), ran.error
    assert not (run.parent / "out").exists()
    assert outside.untouched()


@planted.every()
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_no_file_of_a_run_s_tokenizer_leads_out(run, outside, name, plant):
    """The private key of who converts a downloaded run was copied, verified and pushed."""
    at = run / "tokenizer" / name
    outside.plant(plant, at)
    ran = _convert(run)
    _refused(ran, run, outside, str(at), "--tokenizer")


@planted.every()
def test_nor_does_its_folder(run, outside, plant):
    shutil.copytree(run / "tokenizer", outside.folder, dirs_exist_ok=True)
    outside.remember()
    outside.plant(plant, run / "tokenizer")
    ran = _convert(run)
    assert ran.code == TokenizerError.exit_code
    assert outside.untouched()


@pytest.mark.parametrize("how", ["../somebody/tokenizer", "a/../../somebody/tokenizer", "absolute"])
def test_nor_does_its_name_in_the_sidecar(run, outside, how):
    shutil.copytree(run / "tokenizer", outside.folder / "tokenizer")
    outside.remember()
    (run / "a").mkdir()
    _tell(run, str(outside.folder / "tokenizer") if how == "absolute" else how)
    _refused(_convert(run), run, outside, "leads out of", str(run), "--tokenizer")
    ran = _convert(run, "--tokenizer", outside.folder / "tokenizer")
    assert ran.code == 0


@pytest.mark.parametrize("name", ["x\0y", "x" * 5000, "", "tokenizer/tokenizer.json", "none"])
def test_a_name_that_is_none(run, outside, name):
    _tell(run, name)
    _refused(_convert(run), run, outside)


def test_links_within_the_run_are_followed(run):
    shutil.move(run / "tokenizer" / "tokenizer.json", run / "shared.json")
    (run / "tokenizer" / "tokenizer.json").symlink_to("../shared.json")
    shutil.move(run / "tokenizer", run / "real")
    (run / "tokenizer").symlink_to("real")
    assert _convert(run).code == 0
    out = run.parent / "out"
    assert (out / "tokenizer.json").read_bytes() == (run / "shared.json").read_bytes()


@planted.every()
def test_the_user_s_own_directory_is_the_limit_too(run, outside, plant):
    """It may be a download as well."""
    outside.plant(plant, run / "tokenizer" / "merges.txt")
    with planted.at_once(), pytest.raises(TokenizerError, match="cannot be read"):
        read_tokenizer(str(run / "tokenizer"), model_max_length=None)


@planted.every("plant", planted.SPECIAL)
def test_a_file_that_the_user_names_is_a_regular_one(tmp_path, outside, plant):
    outside.plant(plant, tmp_path / "tokenizer.json")
    with planted.at_once(), pytest.raises(TokenizerError, match="cannot be read"):
        read_tokenizer(str(tmp_path / "tokenizer.json"), model_max_length=None)


def test_a_link_that_the_user_names_is_followed(run, tmp_path):
    (tmp_path / "mine").symlink_to(run / "tokenizer")
    (tmp_path / "my.json").symlink_to(run / "tokenizer" / "tokenizer.json")
    for name in ("mine", "my.json"):
        assert read_tokenizer(str(tmp_path / name), model_max_length=None).size == 258


def test_a_snapshot_of_the_hub_s_cache_is_read(run, tmp_path):
    repo = tmp_path / "hub" / "models--me--model"
    snapshot = shutil.copytree(run / "tokenizer", repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for path in sorted(snapshot.iterdir()):
        shutil.move(path, repo / "blobs" / path.name)
        path.symlink_to(os.path.relpath(repo / "blobs" / path.name, snapshot))
    assert read_tokenizer(str(snapshot), model_max_length=None).size == 258


def test_a_tokenizer_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("moeconv.hf.tokenizer.source._LIMIT", 1000)
    (tmp_path / "tokenizer.json").write_text("{" + " " * 1000)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(TokenizerError, match="is larger than"):
            read_tokenizer(str(spec), model_max_length=None)


@planted.every()
def test_metrics_that_lead_out_are_not_told(run, outside, plant):
    (outside.folder / "secret").write_text('{"kind": "train", "step": 1, "loss": 0.123456789}\n')
    outside.plant(plant, run / "metrics.jsonl")
    ran = _convert(run)
    assert ran.code == 0
    assert "metrics.jsonl" in ran.err
    assert "0.123456789" not in (run.parent / "out" / "moeconv_manifest.json").read_text()


@planted.every("plant", (*planted.LINKS, planted.fifo))
def test_a_sample_that_leads_out_is_not_used(run, outside, plant):
    outside.plant(plant, run / "sample.txt")
    for name in ("sample.txt", "../somebody/secret", str(outside.folder / "secret")):
        _tell(run, None, text_sample=name)
        with planted.at_once():
            sample = find_sample(None, locate(str(run)))
        assert sample.origin == "the text that comes with moeconv"


def test_a_run_at_an_address_has_its_tokenizer_there(run):
    handler = partial(Quiet, directory=str(run))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = Folder.open(f"http://127.0.0.1:{server.server_port}")
        sidecar = RunSidecar.model_validate_json((run / "moeconv_run.json").read_bytes())
        there = run_tokenizer(FoundSidecar(sidecar, address), model_max_length=None)
        here = run_tokenizer(FoundSidecar(sidecar, Folder.open(run)), model_max_length=None)
        for name in ("../tokenizer", "/tokenizer"):
            climbing = sidecar.model_copy(update={"tokenizer": name})
            with pytest.raises(TokenizerError, match="--tokenizer"):
                run_tokenizer(FoundSidecar(climbing, address), model_max_length=None)
        server.shutdown()
    assert there.files == here.files
    assert there.source == f"{address}/tokenizer"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_verify_says_that_a_run_s_tokenizer_outside_was_not_compared(run, outside):
    """The model was converted with --tokenizer: there is a verdict, with a warning."""
    _tell(run, "../somebody")
    candidate = SimpleNamespace(step=locate(str(run)), out=run / "tokenizer")
    (check,) = check_own_tokenizer(candidate)
    assert check.status is Status.WARN
    assert "leads out of" in check.summary
