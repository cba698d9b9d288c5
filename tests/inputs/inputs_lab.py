"""What the tests of inputs share: converting a checkpoint, what the command says of it, configs."""

import yaml
from engine_lab import tensors

from moeconv.arch.defaults import maxtext_defaults
from moeconv.arch.keys import keys
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion


def converted(made, out, spec=None, **options):
    """The tensors that a checkpoint becomes, and the checkpoint as it was opened."""
    config = options.pop("config", None) or made.config_file(out.parent)
    prepared = plan_conversion(str(spec or made.run), ConvertOptions(config=config, **options))
    convert(prepared, out)
    return tensors(out), prepared.source


def as_leaf(*root, value=False, listed=False):
    """Key paths below `root`, as NNX keeps them: `listed` layers, leaves in a `value`."""

    def rename(path):
        keys = list(root)
        for key in path:
            name, _, number = key.rpartition("_")
            if listed and name == "layers" and number.isdigit():
                keys += [name, number]
            else:
                keys.append(key)
        return (*keys, "value") if value else tuple(keys)

    return rename


def warnings(opened):
    """What is said of a checkpoint."""
    return opened.resolution.warnings


def resolved_config(made, **changes):
    """A resolved config of a checkpoint's model, with a value for each of MaxText's settings."""
    known = keys()
    others = {name: "x" for name, key in known.items() if key.kind in ("training", "machine", "io")}
    base = {k: v for k, v in maxtext_defaults()["base"].items() if known[k].kind != "size"}
    derived = {"emb_dim": 16, "num_decoder_layers": 4, "vocab_size": 64, "head_dim": 4}
    config = {**others, **base, **derived, "logits_via_embedding": True, **made.config, **changes}
    return {key: value for key, value in sorted(config.items()) if value is not ...}


def log_of(resolved, prefix="I1126 07:19:42.123456 140000 pyconfig.py:591] "):
    """As configs/pyconfig.py `initialize` logs it, in the midst of other lines."""
    lines = [f"{prefix}Config param {key}: {value}" for key, value in sorted(resolved.items())]
    return "\n".join(["Starting up", *lines, "I1126 completed step: 0, loss: 9.1", ""])


def plain(value):
    """As JSON has it, and so W&B's files."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | None) else str(value)


def yaml_of(resolved):
    return yaml.safe_dump(plain(resolved))


def wandb_of(resolved):
    record = {key: {"desc": None, "value": plain(value)} for key, value in resolved.items()}
    return yaml.safe_dump({"wandb_version": 1, "_wandb": {"value": {"t": {}}}, **record})
