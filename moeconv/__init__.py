"""moeconv: Mixture-of-Experts checkpoints from MaxText to Hugging Face, with evidence.

    import moeconv

    print(moeconv.open_checkpoint("runs/my-moe"))
    moeconv.convert("runs/my-moe", "my-moe-hf")
    print(moeconv.verify("my-moe-hf"))

docs/python-api.md has the rest. Importing this package imports nothing else: a function is imported
when it is first asked for, and each imports only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeconv.api.checkpoint import open_checkpoint
    from moeconv.api.convert import convert, load_plan, plan
    from moeconv.api.families import list_families
    from moeconv.api.push import push
    from moeconv.api.verify import verify

__all__ = [
    "__version__",
    "convert",
    "list_families",
    "load_plan",
    "open_checkpoint",
    "plan",
    "push",
    "verify",
]

__version__ = "0.2.0.dev0"

# Function -> its module in moeconv.api.
_MODULES = {
    "convert": "convert",
    "list_families": "families",
    "load_plan": "convert",
    "open_checkpoint": "checkpoint",
    "plan": "convert",
    "push": "push",
    "verify": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.api.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
