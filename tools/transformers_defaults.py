"""Writes mapping/data/transformers_defaults.json: what a config.json that leaves a key out means.

For each architecture of a page: the defaults of its config class in the installed transformers, and
the other names that it has for its keys. A test compares the file with the installed release.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import transformers

from moeconv.families import targets

OUT = Path(__file__).parents[1] / "moeconv" / "mapping" / "data" / "transformers_defaults.json"


def defaults_of(architecture: str) -> dict[str, Any]:
    """Defaults and aliases of one architecture.

    `rope_theta` is the class's `default_theta` (modeling_rope_utils.py), of which Gemma 3 has two.
    """
    config = getattr(transformers, architecture).config_class
    found = {
        field.name: field.default if field.default is not dataclasses.MISSING else None
        for field in dataclasses.fields(config)
    }
    theta = config.default_theta
    found["rope_theta"] = theta["global"] if isinstance(theta, dict) else theta
    return {"defaults": found, "aliases": dict(config.attribute_map)}


def content() -> dict[str, Any]:
    """The whole file."""
    return {
        "transformers": transformers.__version__,
        "architectures": {
            page.architecture: defaults_of(page.architecture) for page in targets().values()
        },
    }


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(content(), indent=1, sort_keys=True) + "\n")
