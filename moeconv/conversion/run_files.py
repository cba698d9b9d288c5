"""What is written beside a MaxText checkpoint: its config, the sidecar, and the tokenizer."""

from collections.abc import Mapping
from typing import Any

import yaml

from moeconv import __version__
from moeconv.arch.defaults import SCALED_KEYS, TOKEN_IDS
from moeconv.hf.tokenizer import TokenizerFiles
from moeconv.maxtext.sidecar import SIDECAR_NAME
from moeconv.planning.orbax_output import OrbaxOutput
from moeconv.planning.plan import Plan
from moeconv.tensor.dtypes import SIGNIFICAND_BITS
from moeconv.untrusted import strict_json

_EMPTY = b"# MaxText takes this file for its own of this name, so that ../config.yml decides.\n{}\n"
CONFIG_NAME = "config.yml"
TOKENIZER = "tokenizer"

_HEAD = """\
# The model's settings, by moeconv {version} from {source}.
# MaxText takes this file as its config; give it the checkpoint beside it as well:
#   load_parameters_path=<this folder>/checkpoints/0/items
# max_target_length is the longest text that the model takes; shorten it to train.
"""


def run_files(
    plan: Plan, output: OrbaxOutput, tokenizer: TokenizerFiles | None
) -> dict[str, bytes]:
    """Every file but those of the checkpoint and the manifest, by name."""
    settings = dict(output.settings)
    head = _HEAD.format(version=__version__, source=plan.page.architecture)
    text = yaml.safe_dump({"base_config": "base.yml", **settings}, sort_keys=False)
    files = {CONFIG_NAME: (head + text).encode()}
    if (name := settings.get("model_name", "default")) != "default":
        # MaxText looks for the file of a model beside the config first (configs/pyconfig.py
        # `_initialize_pydantic`), and it wins over the config.
        files[f"models/{name}.yml"] = _EMPTY
    ids = {name: getattr(plan.model, name) for name in TOKEN_IDS}
    known = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ids.items()
        if value is not None
    }
    sidecar: dict[str, Any] = {
        "format": "moeconv-run",
        "version": 1,
        "config": {**settings, **_derived(settings), **known},
        "moeconv_version": __version__,
        "tokenizer": None,
        "target": plan.target,
        "narrowed": _narrowed(plan),
    }
    if tokenizer is not None:
        files |= {f"{TOKENIZER}/{name}": raw for name, raw in tokenizer.files.items()}
        if tokenizer.generation:
            own = strict_json.dumps(tokenizer.generation)
            files.setdefault(f"{TOKENIZER}/generation_config.json", own)
        sidecar["tokenizer"] = TOKENIZER
    files[SIDECAR_NAME] = strict_json.dumps(sidecar)
    return files


def _derived(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What MaxText derives from sizes; with it a config is resolved, and no model's file counts."""
    return {key: settings[base] for key, base in SCALED_KEYS.items() if base in settings}


def _narrowed(plan: Plan) -> dict[str, str]:
    """The dtype of the tensors of each array that is wider, for a factor that is folded into it."""
    return {
        name: found.pop()
        for name, edge in plan.edges.items()
        if len(found := {value.number for value in edge.values}) == 1
        and all(SIGNIFICAND_BITS[each] < SIGNIFICAND_BITS[edge.dtype] for each in found)
    }
