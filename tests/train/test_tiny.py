"""The tiny run's parts: tokenizer, rows, config, sidecar. MaxText stays out."""

import enum
import json

import numpy as np
import pytest
import yaml
from moeconv_train import feed as feeds
from moeconv_train import sidecar
from moeconv_train.data.records import read_shard
from moeconv_train.recipe import CONFIGS
from moeconv_train.settings import read_settings, run_file_of
from moeconv_train.tokenizer import TOKENIZER, read_stories
from tokenizers import Tokenizer

import moeconv

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
CONFIG = CONFIGS / "tiny_cpu.yml"


@pytest.fixture(scope="module")
def stories():
    return read_stories()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


def prepare(directory):
    """The tiny recipe's data."""
    settings = read_settings(run_file_of(CONFIG), {}).data
    feed = feeds.Feed("prepared", settings, directory)
    return feeds.prepare(feed, 128, progress=lambda _: None, note=lambda _: None).dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load(CONFIG.read_text())


def test_the_tokenizer_gives_every_text_back(tokenizer, stories):
    texts = [*stories[:20], "", " two  spaces ", "naïve — 日本語 🙂\n\ttab", PAD[:-1]]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_has_as_many_tokens_as_the_model(tokenizer, config):
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_special_tokens_are_three_and_text_begins_with_one(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD)]
    assert ids == [0, 1, 2]
    assert tokenizer.encode("Hi").ids[0] == 0
    assert tokenizer.encode("Hi", add_special_tokens=False).ids[0] > 2


def test_the_rows_are_the_stories_and_fit_the_model(dataset, tokenizer, stories, config):
    assert dataset.manifest.request.sequence_length == config["max_target_length"] == 128
    assert dataset.counts("train").cut == dataset.counts("validation").cut == 0
    found = []
    for split in ("train", "validation"):
        for shard in dataset.shards(split):
            for row in read_shard(shard):
                ends = np.cumsum(row["lengths"])
                for ids in np.split(row["tokens"], ends[:-1]):
                    assert (ids[0], ids[-1]) == (0, 1)
                    found.append(tokenizer.decode(ids.tolist()).strip())
    assert sorted(found) == sorted(stories)


def test_the_recipes_steps_are_what_its_data_have(dataset, config):
    epochs = read_settings(run_file_of(CONFIG), {}).epochs
    assert config["steps"] == dataset.steps_for_epochs(epochs, 8)


def test_preparing_again_gives_the_same_files(dataset, tmp_path):
    again = prepare(tmp_path)
    assert again.digest == dataset.digest
    for name in ("tokenizer.json", "tokenizer_config.json"):
        first, second = (d.directory / "tokenizer" / name for d in (dataset, again))
        assert first.read_bytes() == second.read_bytes()


def test_the_sample_is_of_the_validation_split(dataset, stories):
    settings = read_settings(run_file_of(CONFIG), {}).data
    sample = feeds.sample(feeds.Feed("prepared", settings, dataset.directory, dataset))
    assert len(sample) == dataset.counts("validation").stories > 10
    assert set(sample) < set(stories)


def test_transformers_loads_the_tokenizer(dataset, tokenizer, stories):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(dataset.directory / "tokenizer")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert len(loaded) == tokenizer.get_vocab_size()
    for story in stories[:20]:
        ids = loaded(story).input_ids
        assert ids == tokenizer.encode(story).ids
        assert loaded.decode(ids, skip_special_tokens=True) == story
    told = json.loads((dataset.directory / "tokenizer" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"  # the one that 4.x knows


def test_the_config_names_no_place(config):
    assert not [
        value for value in config.values() if isinstance(value, str) and value.startswith("/")
    ]
    assert not {"base_output_directory", "tokenizer_path", "grain_train_files"} & set(config)


class Block(enum.Enum):
    ENVY = "envy"


@pytest.fixture
def resolved(dataset, tmp_path):
    return {
        "base_output_directory": str(tmp_path),
        "run_name": "r",
        "tokenizer_path": str(dataset.directory / "tokenizer"),
        "decoder_block": Block.ENVY,
        "dtype": np.dtype("float32"),
        "num_experts_per_tok": 2,
        "scan_layers": True,
        "rope_max_timescale": 500_000,
        "mesh": (("data", ("fsdp",)), [1, 2]),
        "dpo": {"beta": 0.1, "reference_path": "elsewhere"},
        "hf_access_token": "hf_secret",
        "some_api_key": "secret",
        "checkpoint_dir": str(tmp_path / "r" / "checkpoints"),
        "grain_train_files": "relative/also.array_record",
        "other": "gs://bucket/thing",
        "home": "~/cache",
        "nothing": None,
    }


def test_the_sidecar_holds_the_config_without_places_and_secrets(resolved, tmp_path):
    path = sidecar.write_sidecar(resolved)
    assert path == tmp_path / "r" / "moeconv_run.json"
    written = json.loads(path.read_text())
    assert written.pop("config") == {
        "run_name": "r",
        "decoder_block": "envy",
        "dtype": "float32",
        "num_experts_per_tok": 2,
        "scan_layers": True,
        "rope_max_timescale": 500_000,
        "mesh": [["data", ["fsdp"]], [1, 2]],
        "dpo": {"beta": 0.1},
        "nothing": None,
    }
    assert written.pop("maxtext_version")
    assert {"python", "maxtext", "jax", "numpy"} <= set(written.pop("versions"))
    assert written == {
        "format": "moeconv-run",
        "version": 1,
        "moeconv_version": moeconv.__version__,
        "tokenizer": "tokenizer",
        "text_sample": None,
        "run": None,
        "data": None,
    }
    assert str(tmp_path) not in path.read_text()
    assert sorted(file.name for file in path.parent.iterdir()) == ["moeconv_run.json", "tokenizer"]


def test_the_sidecar_is_what_moeconv_reads(resolved):
    from moeconv.maxtext.sidecar import SIDECAR_NAME, RunSidecar

    path = sidecar.write_sidecar(resolved)
    assert path.name == SIDECAR_NAME
    read = RunSidecar.model_validate_json(path.read_text())
    assert read.config["decoder_block"] == "envy"
    assert (path.parent / read.tokenizer / "tokenizer.json").is_file()


def test_the_sidecar_of_a_resumed_run_replaces_the_old_one(resolved):
    sidecar.write_sidecar(resolved)
    path = sidecar.write_sidecar(resolved | {"num_experts_per_tok": 1})
    assert json.loads(path.read_text())["config"]["num_experts_per_tok"] == 1


def test_a_run_of_moeconv_0_1_0_that_goes_on_has_its_sidecar_renamed(resolved):
    from moeconv_train import run_dir

    path = sidecar.write_sidecar(resolved)
    path.rename(path.with_name("moeconv.json"))
    assert run_dir.read_sidecar(path.parent).config["num_experts_per_tok"] == 2
    sidecar.write_sidecar(resolved | {"num_experts_per_tok": 1})
    assert sorted(file.name for file in path.parent.iterdir()) == ["moeconv_run.json", "tokenizer"]
    assert run_dir.read_sidecar(path.parent).config["num_experts_per_tok"] == 1


def test_a_tokenizer_that_is_no_local_directory_is_not_promised(resolved):
    path = sidecar.write_sidecar(resolved | {"tokenizer_path": "some-org/some-tokenizer"})
    assert json.loads(path.read_text())["tokenizer"] is None
    path = sidecar.write_sidecar(resolved | {"tokenizer_path": None})
    assert json.loads(path.read_text())["tokenizer"] is None
