"""What a config.json means that leaves a key out is what the installed transformers says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))


@pytest.mark.slow
@pytest.mark.proof("defaults of transformers")
def test_the_table_is_that_of_the_installed_release() -> None:
    """tools/transformers_defaults.py writes it."""
    import transformers_defaults as tool

    assert json.loads(tool.OUT.read_text()) == json.loads(json.dumps(tool.content()))
