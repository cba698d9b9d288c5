"""Where a run's rows come from: prepared by us, or what MaxText itself is set to read."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from moeconv_train.data import DataSet, packed, prepare_dataset, tokens
from moeconv_train.data.manifest import NAME, TOKENIZER, TRAIN, VALIDATION
from moeconv_train.data.records import LENGTHS, TOKENS, read_shard, write_bytes
from moeconv_train.recipe import Recipe
from moeconv_train.settings import EMBEDDED, DataSettings
from moeconv_train.tokenizer import CORPUS

from moeconv.errors import UsageError
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import read_inside

# Documents of the corpus that lie beside the run, for `moeconv verify`.
SAMPLED = 32
# Of the embedded corpus, which has 400 stories.
_EMBEDDED = {"separator": "\n\n", "validation_fraction": 0.05}

# What the packaged recipes have otherwise, as their rows are prepared (docs/data.md).
_TOKENISING: Mapping[str, Any] = {
    "tokenizer_type": "huggingface",
    "tokenize_train_data": True,
    "tokenize_eval_data": True,
    "packing": True,
    "add_bos": True,
    "add_eos": True,
    # 0 reads other data at the second evaluation (docs/data.md).
    "grain_worker_count": 1,
    "grain_worker_count_eval": 1,
}
# Settings that say which data are trained on.
_NAMES = ("dataset_type", "dataset_name", "hf_path", "hf_name", "hf_data_dir", "train_split")
_PLACES = ("dataset_path", "hf_train_files", "grain_train_files", "tokenizer_path")


@dataclass(frozen=True)
class Feed:
    """The rows of a run.

    Attributes:
        kind: `prepared` by us, streamed from the Hub by MaxText (`hf`), or `maxtext`: anything
            else that its own settings name.
        settings: What is to be prepared.
        directory: Where the prepared rows lie or will lie.
        dataset: They, once they are there.
        named: The dataset on the Hub that MaxText's own `hf_path` names.
    """

    kind: Literal["prepared", "hf", "maxtext"]
    settings: DataSettings
    directory: Path | None = None
    dataset: DataSet | None = None
    named: str | None = None

    @property
    def packed(self) -> bool:
        """Whether rows are read by our stage, which masks by segments."""
        return self.kind == "prepared"

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The block in which MaxText makes its iterators."""
        return packed.reading() if self.dataset else contextlib.nullcontext()


def find(config: Mapping[str, Any], recipe: Recipe, output: Path) -> Feed:
    """Decides by all of MaxText's settings, reading nothing but what is prepared already.

    Where nothing says otherwise, rows lie below `output`, MaxText's base_output_directory.

    Raises:
        ConfigError: What lies in the directory is no whole dataset.
        UsageError: Two settings name different data.
    """
    settings = recipe.run.data
    kind = config["dataset_type"]
    keys = {"hf": ("hf_path", "hf_train_files"), "grain": ("grain_train_files",)}.get(kind, ())
    if _named_by(keys, config, recipe):
        settings = settings.model_copy(update={"source": None})
        if kind == "hf":
            named = None if config["hf_train_files"] else str(config["hf_path"])
            return Feed("hf", settings, named=named)
        files = Path(str(config["grain_train_files"]))
        if (files.parent / NAME).is_file() and files.name.startswith(TRAIN):
            return Feed("prepared", settings, files.parent, DataSet.read(files.parent))
    if kind == "hf":
        return Feed("hf", settings)
    if kind != "grain" or config["grain_train_files"]:
        return Feed("maxtext", settings)
    if not (settings.source or settings.directory):
        raise UsageError(
            "there is no data to train on: set run.data.source (a dataset on the Hub, a local file "
            "or folder), run.data.directory (what moeconv data prepare wrote), or "
            "grain_train_files"
        )
    length = int(config["max_target_length"])
    if length < 2:
        raise UsageError(f"max_target_length={length}: a row needs at least 2 tokens")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(settings.source)).name).strip("-.").lower()
    default = output / "data" / f"{name or 'data'}-{length}"
    directory = Path(settings.directory or default).expanduser().absolute()
    there = (directory / NAME).exists() or not settings.source
    return Feed("prepared", settings, directory, DataSet.read(directory) if there else None)


def _named_by(keys: tuple[str, ...], config: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether MaxText's own settings name the data; on the command line they win over a file's.

    Raises:
        UsageError: `run.data` names some too.
    """
    naming = [key for key in keys if config[key]]
    ours = [f"data.{key}" for key in ("source", "directory") if getattr(recipe.run.data, key)]
    if not naming or not ours:
        return bool(naming)
    if any(key in recipe.given for key in naming) and not any(key in recipe.told for key in ours):
        return True
    raise UsageError(f"{naming[0]} and run.{ours[0]}: both name data; leave one of them out")


def prepare(
    feed: Feed,
    length: int,
    *,
    progress: Callable[[str], None],
    note: Callable[[str], None],
    quiet: bool = True,
) -> Feed:
    """The same feed with its dataset, prepared now if it is not there.

    Raises:
        OutputError: What is there was prepared from something else, or otherwise.
        MoeconvError: It cannot be prepared.
    """
    source, settings = feed.settings.source, feed.settings
    if feed.kind != "prepared" or feed.directory is None or source is None:
        return feed
    if feed.dataset is None:
        note(f"preparing {source} in {feed.directory} (once; docs/data.md)")
    if source == EMBEDDED:
        source, settings = str(CORPUS), settings.model_copy(update=_EMBEDDED)
    dataset = prepare_dataset(
        source, feed.directory, settings.options(length), progress=progress, note=note, quiet=quiet
    )
    return replace(feed, dataset=dataset)


def hf_settings(config: Mapping[str, Any], settings: DataSettings) -> dict[str, Any]:
    """MaxText's settings to tokenise while it trains (docs/data.md).

    Its own `hf_path` and `hf_train_files`, if there are any, name the data, else `settings.source`.
    """
    if config["hf_path"] or config["hf_train_files"]:
        evaluated = config["hf_eval_split"] or config["hf_eval_files"]
        return {**_TOKENISING, **({} if evaluated else {"eval_interval": -1})}
    source = settings.source
    if not source:
        return {}
    if source == EMBEDDED or Path(source).expanduser().exists():
        raise UsageError(
            f"dataset_type=hf: run.data.source={source} is no dataset on the Hub; use "
            "dataset_type=grain, or name your files with hf_path and hf_train_files"
        )
    return {
        **_TOKENISING,
        "hf_path": source,
        "hf_eval_split": "validation",
        "train_split": "train",
        "train_data_columns": [settings.column],
        "eval_data_columns": [settings.column],
    }


def tokenizer_for(settings: DataSettings, output: Path) -> str:
    """The tokenizer for streaming: what comes with moeconv or MaxText becomes a directory."""
    name = settings.tokenizer
    if name not in (EMBEDDED, tokens.LLAMA3):
        return name
    directory = output / "data" / f"tokenizer-{name}"
    files = dict(tokens.load(name).files)
    if name == tokens.LLAMA3:
        # MaxText masks its pad token wherever it stands (input_pipeline_utils.py,
        # `shift_and_refine`), and would take id 0, the exclamation mark, for want of one.
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            told = {**json.loads(files[file]), "pad_token": "<|reserved_special_token_0|>"}
            files[file] = strict_json.dumps(told)
    for file, content in files.items():
        write_bytes(directory / file, content)
    return str(directory)


def source_digest(config: Mapping[str, Any]) -> str:
    """What MaxText's settings say of the data, by the names of files; folders may move.

    Only the digest is kept beside a run: paths of this machine are nobody else's business.
    """
    told: dict[str, Any] = {key: config[key] for key in _NAMES}
    for key in _PLACES:
        told[key] = [Path(place).name for place in re.split("[,;]", str(config[key] or ""))]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def hub_id(feed: Feed) -> str | None:
    """The dataset on the Hub that a run is trained on; a local path is nobody else's business."""
    if feed.dataset is not None:
        source = feed.dataset.manifest.request.source
        return source.name if source.kind == "hub" else None
    name = feed.named or (feed.settings.source if feed.kind == "hf" else None)
    return name if name and not Path(name).expanduser().exists() else None


def sample(feed: Feed) -> list[str]:
    """Some documents of the corpus, of its validation split if it has one."""
    if feed.dataset is None:
        return []
    from tokenizers import Tokenizer

    dataset = feed.dataset
    tokenizer = Tokenizer.from_buffer(read_inside(dataset.directory / TOKENIZER, "tokenizer.json"))
    split = VALIDATION if dataset.counts(VALIDATION).rows else TRAIN
    stories = (
        tokenizer.decode(story.tolist()).strip()
        for shard in dataset.shards(split)
        for row in read_shard(shard)
        for story in np.split(row[TOKENS], np.cumsum(row[LENGTHS])[:-1])
    )
    return list(itertools.islice(stories, SAMPLED))
