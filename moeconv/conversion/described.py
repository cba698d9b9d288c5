"""From a config.json to the description of a model: the pages' config tables, walked the other way.

What is read is written again by the page, and compared: nothing of a config is passed over.
"""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

from moeconv.arch.blocks import Block, settings_of
from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.parameters import LayerKind
from moeconv.arch.yaml_file import short
from moeconv.errors import ConfigError, UnsupportedError
from moeconv.families import blocks, targets
from moeconv.hf.config import model_config
from moeconv.mapping.edges import cannot_hold
from moeconv.mapping.reading import ROPE_KEYS, Multimodal, Peek, Reading, text_config
from moeconv.mapping.rules import Options, Target
from moeconv.planning.model_values import model_of

# Keys that change nothing that is computed from given weights and tokens, of every architecture:
# names, versions, training, and what `generate` and pipelines read.
_ASIDE = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map",
        "chunk_size_feed_forward",
        "do_sample", "dtype", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
        "max_length", "max_window_layers", "model_type", "output_attentions",
        "output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type",
        "quantization_config", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
        "temperature", "top_k", "top_p", "torch_dtype", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_cache", "_attn_implementation_autoset",
    }
)  # fmt: skip
_FIELDS = {field.name for field in fields(ModelDescription)} - {"sources", "settings"}


@dataclass(frozen=True)
class Described:
    """What a config.json says.

    Attributes:
        page: The architecture's page.
        block: MaxText's decoder block.
        model: The model.
        notes: Sentences for people.
    """

    page: Target
    block: Block
    model: ModelDescription
    notes: tuple[str, ...]


@cache
def _architectures() -> Mapping[str, Any]:
    path = resources.files("moeconv.mapping") / "data" / "transformers_defaults.json"
    found: Mapping[str, Any] = json.loads(path.read_text())["architectures"]
    return found


def page_of(config: Mapping[str, Any], where: str) -> Target:
    """The page of a config's architecture.

    Raises:
        ConfigError: It names none.
        UnsupportedError: It has no page, or one that is not read.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ConfigError(
            f"{where}: architectures should name one class of transformers, and is {short(named)}"
        )
    for page in targets().values():
        whole = () if page.reading is None else page.reading.multimodal
        if named[0] in (page.architecture, *(each.architecture for each in whole)):
            if page.reading is None:
                raise UnsupportedError(
                    f"{where}: {named[0]} converts from MaxText only; {_readable()}"
                )
            return page
    raise UnsupportedError(f"{where}: {named[0]} has no page; {_readable()}")


def _readable() -> str:
    names = sorted(page.architecture for page in targets().values() if page.reading is not None)
    return f"moeconv reads {', '.join(names)}"


def text_model(
    config: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Any], Multimodal | None]:
    """The config of the text model, and the multimodal class that holds it, if one does.

    Raises:
        ConfigError: There is no text_config.
        UnsupportedError: As `page_of`.
    """
    page = page_of(config, where)
    assert page.reading is not None
    for whole in page.reading.multimodal:
        if whole.architecture in config["architectures"]:
            if not isinstance(config.get("text_config"), Mapping):
                raise ConfigError(f"{where}: a {whole.architecture} has a text_config")
            return text_config(config, whole, page.architecture), whole
    return config, None


def describe(
    config: Mapping[str, Any],
    where: str,
    *,
    block: str | None = None,
    accept: Collection[str] = (),
    peek: Peek | None = None,
) -> Described:
    """Understands a config.json.

    Args:
        config: Its content.
        where: Where it is.
        block: MaxText's decoder block; None for the first that holds the model.
        accept: Keys that nobody knows, and that the user says decide nothing.
        peek: Looks at the model's tensors, where it has any.

    Raises:
        ConfigError: A key is missing, or has no sensible value.
        UnsupportedError: MaxText cannot compute this model, or a key's meaning is not known.
    """
    page = page_of(config, where)
    reading = page.reading
    assert reading is not None
    own = _of(page)
    given = {_name(page, key): value for key, value in config.items()}
    try:
        whole = _completed(given, own["defaults"], reading)
        values, settings = _read(page, whole)
        if reading.kinds is not None and peek is not None:
            seen = reading.kinds(whole, peek)
        else:
            seen = None
        chosen = _block(page, values, whole["num_hidden_layers"], block, seen)
        if seen is not None and any(kind.mlp == "dense" for kind in values["layer_kinds"]):
            values["intermediate_size"] = whole["intermediate_size"]
        model = _model(values, settings, chosen, where)
        if (reason := cannot_hold(page, model)) is not None:
            raise UnsupportedError(reason)
        _check(page, model, whole, where)
        notes = _check_keys(page, given, own["defaults"], accept)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{where}: this model cannot be converted exactly: {error}"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, KeyError):
            raise ConfigError(f"{where} lacks {error.args[0]}") from None
        raise ConfigError(f"{where} describes no {page.architecture}: {short(error)}") from None
    sources = dict.fromkeys(model.values(), Provenance(Origin.CONFIG, str(where)))
    return Described(page, chosen, replace(model, sources=sources), tuple(notes))


def _completed(
    given: Mapping[str, Any], defaults: Mapping[str, Any], reading: Reading
) -> dict[str, Any]:
    """A config with all that it leaves to transformers."""
    whole = {**defaults, **given}
    for key, derive in reading.derived.items():
        if whole.get(key) in (None, []):
            whole[key] = derive(whole)
    return whole


def _name(page: Target, key: str) -> str:
    """The name by which the architecture's config class has a key."""
    found: str = _of(page)["aliases"].get(key, key)
    return found


def _of(page: Target) -> Mapping[str, Any]:
    """Defaults and aliases of an architecture; none where the installed page is not moeconv's."""
    found: Mapping[str, Any] = _architectures().get(
        page.architecture, {"defaults": {}, "aliases": {}}
    )
    return found


def _read(page: Target, whole: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and settings that a config gives."""
    assert page.reading is not None
    values: dict[str, Any] = dict.fromkeys(_FIELDS)
    settings: dict[str, Any] = {}
    # Where two keys are one field, the one of its name counts; comparing shows if they differ.
    for key in sorted(page.config, key=lambda key: key.key == key.field):
        if key.field in _FIELDS:
            values[key.field] = whole.get(_name(page, key.key))
        elif key.setting is not None:
            settings[key.setting] = whole.get(_name(page, key.key))
    if "layer_types" in whole:
        settings["layer_types"] = whole["layer_types"]
    values |= {"normalize_embedding_logits": False, **page.reading.fields(whole)}
    return values, {**settings, **page.reading.settings(whole)}


def _block(
    page: Target,
    values: dict[str, Any],
    layers: int,
    wanted: str | None,
    seen: Sequence[str] | None,
) -> Block:
    """The decoder block, and in `values` the kinds of its layers."""
    unmade = page.reading.unmade if page.reading is not None else ()
    possible = [
        block
        for block in blocks().values()
        if page.name in block.targets and block.name not in unmade
    ]
    possible.sort(key=lambda b: (b.name != page.name, b.targets.index(page.name)))
    if wanted is not None and wanted not in {block.name for block in possible}:
        raise UnsupportedError(
            f"--block {wanted} has no {page.architecture}; give one of "
            f"{', '.join(block.name for block in possible)}"
        )
    choices: list[Sequence[str] | None] = [
        each for each in (seen, values.get("layer_kinds")) if each is not None
    ] or [None]
    for kinds, block in itertools.product(choices, possible):
        if wanted not in (None, block.name):
            continue
        if kinds is None:
            held = [kind for kind in block.layers if kind in page.kinds]
            kinds = held * layers if len(held) == 1 else []
        if kinds and len(kinds) == layers and all(kind in block.layers for kind in kinds):
            values["layer_kinds"] = tuple(map(LayerKind, kinds))
            return block
    raise UnsupportedError("no decoder block of MaxText has its kinds of layer")


def _model(
    values: dict[str, Any], settings: Mapping[str, Any], block: Block, where: str
) -> ModelDescription:
    wanted = {spec.name for spec in settings_of(block, values)}
    if block.layer_types is not None:
        wanted.add("layer_types")
    if lacking := sorted(wanted - settings.keys()):
        raise UnsupportedError(f"its config does not say {', '.join(lacking)}")
    own = {name: settings[name] for name in wanted}
    plain = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in {**values, **own, "decoder_block": block.name}.items()
    }
    return model_of(plain)


def _check(page: Target, model: ModelDescription, whole: Mapping[str, Any], where: str) -> None:
    """What the page writes of the model must be what was read.

    Raises:
        UnsupportedError: Names the first key that is not.
    """
    assert page.reading is not None
    ours = model_config(page, model, "float32", Options())
    aside = _ASIDE | ROPE_KEYS | page.reading.ignored
    for key, value in ours.items():
        read = whole.get(_name(page, key))
        if key not in aside and read != value:
            raise UnsupportedError(
                f"{key} is {short(read)}, and MaxText's {model.decoder_block} computes "
                f"what {short(value)} means"
            )
    theirs, made = page.reading.ropes(whole), page.reading.ropes({**whole, **_ropes(ours)})
    if theirs != made:
        raise UnsupportedError(
            f"its RoPE is {short(theirs)}, and MaxText's {model.decoder_block} computes "
            f"{short(made)}"
        )


def _ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that hold RoPE."""
    empty: dict[str, Any] = dict.fromkeys(ROPE_KEYS)
    return {**empty, **{key: config[key] for key in ROPE_KEYS & config.keys()}}


def _check_keys(
    page: Target,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    accept: Collection[str],
) -> list[str]:
    """Every key of a config is written by the page, or changes nothing.

    Raises:
        UnsupportedError: One is not, so that nobody knows what it does.
    """
    assert page.reading is not None
    known = {_name(page, key.key) for key in page.config}
    known |= _ASIDE | ROPE_KEYS | page.reading.ignored
    # Of layers that are all alike; where they are not, the page writes it.
    if set(given.get("layer_types") or ()) == {"full_attention"}:
        known.add("layer_types")
    wrong = {
        key: value
        for key, value in given.items()
        if key not in known
        and not (key in defaults and value in (defaults[key], None))
        and value is not None
    }
    for key in sorted(wrong.keys() - set(accept)):
        if key in defaults:
            raise UnsupportedError(
                f"{key} is {short(wrong[key])}, and MaxText computes what {short(defaults[key])} "
                "means"
            )
        raise UnsupportedError(
            f"moeconv does not know what {key}={short(wrong[key])} means; if it does not change "
            f"what the model computes, pass --accept-key {key}"
        )
    return [
        f"--accept-key: whether {key} changes the model is not known to moeconv; it is taken not to"
        for key in sorted(wrong)
    ]
