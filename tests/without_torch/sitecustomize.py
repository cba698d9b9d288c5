"""On PYTHONPATH of a process that trains, torch is not installed: as in the trainer's own venv."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
