"""config.json as different readers understand it: one file, one model, in every release.

Releases differ in where they look. A theta that only one of them finds gives the other a default,
silently: transformers 4 would run at 10,000 or 1,000,000 what was trained at 500,000.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from moeconv.verification.boundary import blaming
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.levels import Level
from moeconv.verification.models.transformers_load import load_config, quiet

Config = Mapping[str, Any]

_OF = CheckFactory(Level.STRUCTURE)
# Written for other releases; 5 keeps them as something else, or writes its own.
_RENAMED = {"torch_dtype", "dtype", "transformers_version", "architectures", "rope_scaling"}


def as_transformers_4(config: Config) -> dict[str, Any]:
    """What releases before 5 take from a config.json, and mlx-lm and llama.cpp like them.

    `rope_theta`, `rope_scaling` and `partial_rotary_factor` at the top level
    (models/*/configuration_*.py and modeling_rope_utils.py `_compute_*` of 4.x), the dtype as
    `torch_dtype` (configuration_utils.py). Where there is a `rope_local_base_freq`, layers with a
    window have it and no scaling (models/gemma3/modeling_gemma3.py of 4.x). An architecture without
    RoPE has none of these keys.
    """
    if not config.keys() & {"rope_theta", "rope_scaling"}:
        return {"rope": {}, "dtype": config.get("torch_dtype")}
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if "partial_rotary_factor" in config:
        scaling["partial_rotary_factor"] = config["partial_rotary_factor"]
    rope = {"rope_type": kind, "rope_theta": config.get("rope_theta"), **scaling}
    if (local := config.get("rope_local_base_freq")) is not None:
        plain = {"rope_type": "default", "rope_theta": local}
        rope = _one({"full_attention": rope, "sliding_attention": plain})
    return {"rope": rope, "dtype": config.get("torch_dtype")}


def as_transformers_5(config: Config) -> dict[str, Any]:
    """What 5 takes: `rope_parameters` and `dtype`; of equal ones for each kind of layer, one.

    modeling_rope_utils.py `RotaryEmbeddingConfigMixin`, configuration_utils.py.
    """
    rope = _one(dict(config.get("rope_parameters") or {}))
    return {"rope": rope, "dtype": config.get("dtype")}


def _one(rope: dict[str, Any]) -> dict[str, Any]:
    """Of equal numbers for each kind of layer, one."""
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)]
    return kinds[0] if kinds and kinds == [kinds[0]] * len(rope) else rope


def check_config_readers(candidate: Candidate) -> Check:
    """The rules of 4.x and 5.x, and the installed release itself, read the same model.

    The release is only asked of a config.json that check `config` finds right: of another one it
    would build whatever that asks for. 4.x is not asked of an architecture that it does not have.
    """
    config = candidate.config
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if not isinstance(value, dict | None):
            summary = f"{key} of config.json is {value!r}, not an object"
            return _OF.failed("readers", summary)
    four, five = as_transformers_4(config), as_transformers_5(config)
    both = int(candidate.family.since.partition(".")[0]) < 5
    wrong = [
        f"{key}: {four[key]} by the rules of transformers 4, {five[key]} by those of 5"
        for key in four
        if both and four[key] != five[key]
    ]
    asked = f"the rules of transformers {'4 and 5' if both else '5'}"
    if not wrong and not candidate.wrong_keys and importlib.util.find_spec("transformers"):
        what = f"transformers cannot read config.json of {candidate.out}"
        with blaming(what, check="readers"), quiet():
            version, read = _installed(candidate)
        asked += f", and {version} itself,"
        wrong += [
            f"{key}: {value!r} by transformers {version}, {config[key]!r} in the file"
            for key, value in read.items()
            if value != config[key]
        ]
    if wrong:
        return _OF.failed("readers", "config.json is not read alike: " + "; ".join(wrong))
    return _OF.passed("readers", f"{asked} read the same model from config.json")


def _installed(candidate: Candidate) -> tuple[str, dict[str, Any]]:
    """The installed release, and its values of the keys that it keeps under their own names."""
    import transformers

    read = load_config(candidate.out)
    if getattr(read, "is_heterogeneous", False):  # of the layers that have no sizes of their own
        read.allow_global_per_layer_attribute_access = True
    names = [k for k in candidate.config if k not in _RENAMED and hasattr(read, k)]
    own = {k: getattr(read, k) for k in names}
    return transformers.__version__, own
