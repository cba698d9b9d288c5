"""Writes moeconv/arch/data/maxtext_defaults.json and maxtext_keys.json from the installed MaxText.

Run it when a new MaxText is supported, once with each version on the path:

    python tools/maxtext_defaults.py [VERSION=CONFIGS_DIR …]

Each CONFIGS_DIR is the `configs/` folder of one MaxText release, oldest first (default: the
installed one alone). The keys are those that decide a conversion; releases must agree on every
default they share, but for base sizes, which shapes tell anyway, and neutral values. A key
that nobody has classified ends it before anything is written (tools/maxtext_keys.py).
"""

import importlib.util
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import maxtext_keys as classified
import yaml
from moeconv_train.recipe import maxtext_keys

from moeconv.arch.fields import TOLD_KEYS
from moeconv.arch.keys import function_keys
from moeconv.families import blocks, refused

TARGET = Path(__file__).parents[1] / "moeconv" / "arch" / "data" / "maxtext_defaults.json"


# Defaults that changed; another value shows in the parameters of the blocks that honour it.
SHOWN = {"shared_experts"}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats, as OmegaConf reads them."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d*([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def load(path: Path) -> dict[str, Any]:
    """A YAML file as MaxText reads it; the text None is None."""
    content = yaml.load(path.read_text(), Loader=_Loader)
    return {k: None if v == "None" else v for k, v in content.items()}


def installed() -> Path:
    """The installed MaxText's configs folder, found without importing it."""
    spec = importlib.util.find_spec("maxtext")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("maxtext is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "configs"


def extract(folders: list[Path], versions: list[str]) -> dict[str, Any]:
    """The extract; later folders add keys and must not change any."""
    functions = function_keys()
    keys = sorted({*TOLD_KEYS, *functions})
    base: dict[str, Any] = {}
    models: dict[str, dict[str, Any]] = {}
    always = set(keys)
    for folder in folders:
        content = load(folder / "base.yml")
        always &= content.keys()
        for key in keys:
            if key in content:
                differs = key in base and base[key] != content[key]
                plain = key in functions and all(
                    map(functions[key].is_neutral, (base.get(key), content[key]))
                )
                if differs and not key.startswith("base_") and not plain and key not in SHOWN:
                    raise SystemExit(f"{key}: {base[key]} became {content[key]} in {folder}")
                base[key] = content[key]
        for path in sorted((folder / "models").glob("*.yml")):
            model = load(path)
            if model.get("decoder_block", "llama2") in {*blocks(), *refused()}:
                models[path.stem] = {k: model[k] for k in keys if k in model}
    return {
        "maxtext_versions": versions,
        "base": dict(sorted(base.items())),
        "always": sorted(always),  # in each release, so in every resolved config
        "models": models,
    }


def main() -> None:
    """Writes both files."""
    pairs = [a.partition("=")[::2] for a in sys.argv[1:]]
    folders = [Path(folder) for _, folder in pairs] or [installed()]
    versions = [v for v, _ in pairs] or [version("maxtext")]
    text = json.dumps(extract(folders, versions), indent=1) + "\n"
    before = json.loads(TARGET.read_text())["maxtext_versions"][-1]
    keys = classified.renewed(classified.read(), maxtext_keys(), before)
    TARGET.write_text(text)
    classified.PATH.write_text(classified.text(keys))
    print(f"wrote {TARGET} and {classified.PATH}")


if __name__ == "__main__":
    main()
