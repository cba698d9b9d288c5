"""The card's metadata: what the Hub reads; and how it joins a README that is already there."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from moeconv.errors import OutputError
from moeconv.families import targets
from moeconv.hub.gate import Judgement
from moeconv.hub.local import Output
from moeconv.untrusted.text import printable

# Characters of a README.
_MOST = 2**22


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can make more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name)")
        return super().compose_node(parent, index)


UNVERIFIED_TAG = "unverified"
# Tags that push itself gives and takes away.
_OWN_TAGS = ("maxtext", "moe", "moeconv", UNVERIFIED_TAG)  # and the name of the target
_MARK = re.compile(r"\n<!-- moeconv card ([0-9a-f]{64}) -->\n?\Z")


def make_metadata(
    output: Output, judgement: Judgement, *, name: str, license_id: str | None
) -> dict[str, Any]:
    """The metadata, without anything that is not known.

    Args:
        output: What is pushed.
        judgement: What is known of it.
        name: The model's name, for its evaluation results.
        license_id: Of the model.
    """
    run = output.manifest.run
    facts = run.facts if run else None
    tags = ["maxtext", "moeconv", output.manifest.target]
    if output.model.moe_layers:
        tags.insert(1, "moe")
    if not judgement.verified:
        tags.append(UNVERIFIED_TAG)
    results = _results(output)
    data = ModelCardData(
        language=one_line(facts.language) if facts and facts.language else None,
        license=one_line(license_id) if license_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=[output.dataset] if output.dataset else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    found: dict[str, Any] = data.to_dict()
    return found


def one_line(text: str) -> str:
    """Text of others without line ends and control characters."""
    return printable(" ".join(text.split()))


def _results(output: Output) -> list[EvalResult]:
    """The last evaluation, where it is known on which data."""
    run = output.manifest.run
    dataset = output.dataset
    if run is None or run.evaluation is None or dataset is None:
        return []
    loss = run.evaluation.loss
    values = {"loss": ("Evaluation loss (nats per token)", loss)}
    if loss < 50:
        values["perplexity"] = ("Evaluation perplexity", float(f"{math.exp(loss):.6g}"))
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=dataset,
            dataset_name=dataset.split("/")[-1],
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for kind, (label, value) in values.items()
    ]


def assemble(metadata: Mapping[str, Any], body: str) -> str:
    """A card of ours: it ends with a digest of its text, so that a later edit is noticed."""
    return _put(metadata, f"{body}\n<!-- moeconv card {_digest(body)} -->\n")


def is_ours(readme: str) -> bool:
    """True if a README is a card of push whose text is unedited (its metadata may be)."""
    text = _body(readme)
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip("\n").encode()).hexdigest()


def join(readme: str, ours: Mapping[str, Any], *, where: str, override: Iterable[str] = ()) -> str:
    """A user's README with our metadata where it has none of its own; its text stays.

    Args:
        readme: As it is.
        ours: Our metadata.
        where: Of the README, for messages.
        override: Keys that the user gave on the command line; they win.

    Raises:
        OutputError: Its metadata cannot be read.
    """
    theirs = read_metadata(readme, where)
    merged = {**ours, **theirs, **{key: ours[key] for key in override if key in ours}}
    kept = [tag for tag in _list(theirs.get("tags")) if tag != UNVERIFIED_TAG]
    merged["tags"] = list(dict.fromkeys([*kept, *ours["tags"]]))
    if "datasets" in ours:
        merged["datasets"] = list(
            dict.fromkeys([*_list(theirs.get("datasets")), *ours["datasets"]])
        )
    if "model-index" in ours:
        merged["model-index"] = _join_results(theirs.get("model-index"), ours["model-index"])
    return _put(merged, readme)


def renew(readme: str, ours: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our metadata, with keys and tags that users added to our card on the Hub."""
    theirs = read_metadata(readme, where)
    added = [tag for tag in _list(theirs.get("tags")) if tag not in (*_OWN_TAGS, *targets())]
    theirs.pop("model-index", None)
    return {**theirs, **ours, "tags": [*ours["tags"], *added]}


def read_metadata(readme: str, where: str) -> dict[str, Any]:
    """The metadata of a README.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        # What finds the block takes time by the square of them.
        if re.search(r"[\r\n]{100}", readme) or len(readme) > _MOST:
            raise ValueError("it is longer than any README, or has a hundred empty lines")
        block = REGEX_YAML_BLOCK.search(readme)
        if block is None:
            return {}
        content = yaml.load(block[2], Loader=_Loader)
        if content is not None and not isinstance(content, dict):
            raise ValueError("it holds no `key: value` lines")
        ModelCardData(**(content or {}))
        if isinstance(content, dict) and "model-index" in content:
            model_index_to_eval_results(content["model-index"])
    except (
        yaml.YAMLError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = one_line(str(error))[:200]
        raise OutputError(
            f"the metadata between the --- lines of {where} cannot be read ({reason}); mend it"
        ) from None
    return content or {}


def _body(readme: str) -> str:
    block = REGEX_YAML_BLOCK.search(readme)
    return readme if block is None else readme[block.end() :]


def _put(metadata: Mapping[str, Any], readme: str) -> str:
    """A README with other metadata, laid out by huggingface_hub; its keys keep their order."""
    card = ModelCard(readme if REGEX_YAML_BLOCK.search(readme) else f"---\n{{}}\n---\n{readme}")
    card.data = ModelCardData(**metadata)
    content: str = card.content
    return content


def _join_results(theirs: Any, ours: Any) -> Any:
    """Our results replace those of the same metric on the same data; others stay."""
    name, mine = model_index_to_eval_results(ours)
    keys = {_key(result) for result in mine}
    others = []
    if theirs:
        name, others = model_index_to_eval_results(theirs)
    return eval_results_to_model_index(name, [r for r in others if _key(r) not in keys] + mine)


def _key(result: EvalResult) -> tuple[Any, ...]:
    return (result.task_type, result.dataset_type, result.dataset_split, result.metric_type)


def _list(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]
