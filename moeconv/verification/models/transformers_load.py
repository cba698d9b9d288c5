"""The one door to transformers' loaders: no code of a model is run, nothing is fetched.

Whatever is called here gets `trust_remote_code=False` (without it transformers asks on the
terminal), `local_files_only=True`, safetensors only (a pickle can run anything), and plain
implementations, since config.json may name kernels of the Hub. What still would make transformers
look beyond the weights is refused before it sees the folder. A test checks that no other module has
such a call.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import ConfigError, MissingPackageError, TensorError, to_install
from moeconv.untrusted.files import read_inside
from moeconv.untrusted.strict_json import loads
from moeconv.verification.files import demand_loadable_files

_PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
# Of config.json and tokenizer_config.json: code beside the model or on the Hub, kernels fetched by
# name, other files in place of the weights, quantisers that bring kernels of their own.
_HOOKS = {
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "kernel_config",
    "kernels",
    "quantization_config",
    "compression_config",
    "transformers_weights",
    "custom_pipelines",
    "custom_generate",
}
# With peft installed, transformers puts an adapter over the weights, or loads another model.
_ADAPTER = "adapter_config.json"


def load_config(folder: Path) -> Any:
    """config.json as transformers reads it.

    Raises:
        TensorError: It asks for more than itself.
        Exception: Whatever transformers raises.
    """
    from transformers import AutoConfig

    _demand_plain(folder, "config.json")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def build_empty(config: Any) -> Any:
    """The model of a config that `load_config` gave, on the meta device: no memory for values."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **_PLAIN)


def load_model(folder: Path, *, dtype: Any) -> tuple[Any, Mapping[str, Any]]:
    """The whole model, and what transformers says of missing and unexpected tensors.

    Its generation_config.json is left out: it may ask for any search, assistant or compiler.

    Raises:
        TensorError: Its config asks for more than itself.
        Exception: Whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    _demand_plain(folder, "config.json")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **_PLAIN,
    )
    model.generation_config = GenerationConfig()
    return model, report


def load_tensors(
    kind: type[Any], config: Any, tensors: Mapping[str, Any], *, dtype: Any
) -> tuple[Any, Mapping[str, Any]]:
    """As `load_model`, of a class and a config that came from here, and of tensors in memory."""
    return kind.from_pretrained(  # type: ignore[no-any-return]
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **_PLAIN,
    )


def check_folder(folder: str | Path) -> Path:
    """A folder with a config and weights, and the packages to load them."""
    folder = Path(folder)
    if folder.is_dir():
        demand_loadable_files(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise TensorError(f"{folder} is not a Hugging Face model: it has no *.safetensors.")
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        raise MissingPackageError(f"transformers is not installed; {to_install('verify')}")
    return folder


def check_whole(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuses what transformers says of missing and unexpected tensors (`load_model`).

    Raises:
        TensorError: There are any.
    """
    if wrong := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise TensorError(
            f"transformers does not load {folder} whole: "
            + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items())
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers loads it; its chat template is never rendered.

    Raises:
        TensorError: A config asks for more than itself.
        Exception: Whatever transformers raises.
    """
    from transformers import AutoTokenizer

    _demand_plain(folder, "config.json", "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own words and bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _demand_plain(folder: Path, *configs: str) -> None:
    """Nothing in the folder makes transformers run, fetch or read something else.

    Raises:
        TensorError: Something does, or config.json cannot be read.
    """
    for path in folder.iterdir():
        if path.name == _ADAPTER:
            raise TensorError(f"{path} would put other weights over those of the model; remove it")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise TensorError(f"{path} is a FIFO, device or socket; remove it")
    for name in configs:
        try:
            content = loads(read_inside(folder, name))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise TensorError(f"{folder / name} cannot be read as JSON: {error}") from None
        if hooks := sorted(_hooks(content)):
            raise TensorError(
                f"{folder / name} has {', '.join(hooks)}: code, kernels or files that are not "
                "those of the model; nothing of it is run or fetched, remove that"
            )


def _hooks(content: Any) -> set[str]:
    """The keys of `_HOOKS` with a value, however deep."""
    found, left = set(), [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            found |= {k for k, v in value.items() if k.lstrip("_") in _HOOKS and v is not None}
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found
