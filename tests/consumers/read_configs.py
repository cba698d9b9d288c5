"""Reads the config.json of model directories with the transformers of this Python."""

import json
from pathlib import Path
from typing import Any

from consumer import main
from transformers import AutoConfig


def read(directory: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(directory)
    keys = json.loads((directory / "config.json").read_text())
    held = config.to_dict()
    del keys["transformers_version"], held["transformers_version"]  # it writes its own
    found = {
        # What a class calls otherwise is an attribute under the file's name too.
        "read": {k: held[k] if k in held else getattr(config, k, "lacks it") for k in keys},
        "defaults": {key: value for key, value in held.items() if key not in keys},
    }
    # JSON has no dtypes; torch's are known by their names.
    return json.loads(json.dumps(found, default=lambda value: str(value).removeprefix("torch.")))


main(read)
