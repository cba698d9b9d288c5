"""What the runners share. They are executed by the consumers' own Pythons, which lack moeconv."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As long as fits into the smallest context of 64 with what is generated.
PROMPT = "Once upon a time there was a small fox who lived near a river and was kind to the birds."
# Tokens to generate, greedily.
STEPS = 8


def reference_of(directory: Path) -> Path:
    """Where MaxText's `tokens` [B, T] and `logits` [B, T, V] for a model directory lie."""
    return directory.parent / f"{directory.name}.npz"


def main(read: Callable[[Path], dict[str, Any]]) -> None:
    """Prints, as JSON, what `read` finds in each model directory of the command line."""
    found: dict[str, dict[str, Any]] = {}
    for argument in sys.argv[1:]:
        directory = Path(argument)
        try:
            found[directory.name] = read(directory)
        except Exception as error:  # whatever a consumer says when it refuses
            found[directory.name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
