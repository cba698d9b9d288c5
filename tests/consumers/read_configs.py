"""Reads the config.json of model directories with the transformers of this Python."""

import json
from pathlib import Path
from typing import Any

from consumer import main
from transformers import AutoConfig


def read(directory: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(directory)
    keys = json.loads((directory / "config.json").read_text())
    found = {
        "read": {key: getattr(config, key) for key in keys if hasattr(config, key)},
        "defaults": {key: value for key, value in config.to_dict().items() if key not in keys},
    }
    # JSON has no dtypes; torch's are known by their names.
    return json.loads(json.dumps(found, default=lambda value: str(value).removeprefix("torch.")))


main(read)
