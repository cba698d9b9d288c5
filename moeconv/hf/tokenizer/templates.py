"""Chat templates that have names, beside the default one.

transformers 5 keeps each in a file of its own, `additional_chat_templates/NAME.jinja`, and reads
none from `tokenizer_config.json` where there is a file. The list there, of names and templates, is
read by transformers 4 as well (`PreTrainedTokenizerBase.__init__`, tokenization_utils_base.py).
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moeconv.errors import TokenizerError
from moeconv.untrusted.files import inside
from moeconv.untrusted.text import printable

FOLDER = "additional_chat_templates"
_DEFAULT_FILE, _SUFFIX = "chat_template.jinja", ".jinja"
# Of one model people publish three.
_MOST = 100


def names_in(folder: Path) -> list[str]:
    """Names of the files with further templates in a tokenizer's folder, relative to it."""
    with contextlib.suppress(OSError):
        return [f"{FOLDER}/{path.name}" for path in inside(folder, FOLDER).glob(f"*{_SUFFIX}")]
    return []


def read_templates(
    names: Iterable[str], read: Callable[[str, int], bytes | None], source: str, *, limit: int
) -> dict[str, bytes]:
    """The files with further templates.

    Args:
        names: Names of files in `FOLDER`, relative to the tokenizer's.
        read: Gets a name and the most bytes; gives the content, None where there is none.
        source: Where the tokenizer is, for people.
        limit: Bytes that they may have together.

    Raises:
        TokenizerError: They are too many or too large.
    """
    found: dict[str, bytes] = {}
    for name in sorted(names):
        if (raw := read(name, limit)) is not None:
            found[name] = raw
        if len(found) > _MOST or sum(map(len, found.values())) > limit:
            raise TokenizerError(
                f"{source}: {FOLDER} has more than {_MOST} templates, or more than "
                f"{limit // 2**20} MiB of them; remove those that the model does not need"
            )
    return found


def put_into(
    config: Mapping[str, Any], files: dict[str, bytes], source: str
) -> tuple[dict[str, Any], list[str]]:
    """Moves further templates, and the default one with them, into a tokenizer's config.

    Args:
        config: The object of its `tokenizer_config.json`.
        files: Its files, from which those of the templates are taken away if there are further
            ones.
        source: Where it is, for people.

    Returns:
        The config and a note.

    Raises:
        TokenizerError: A template is no UTF-8.
    """
    texts = {
        name: _text(raw, name, source)
        for name, raw in files.items()
        if name == _DEFAULT_FILE or name.startswith(f"{FOLDER}/")
    }
    further = {name: text for name, text in texts.items() if name != _DEFAULT_FILE}
    if not further:
        return dict(config), []
    templates = _listed(config.get("chat_template"))
    if _DEFAULT_FILE in texts:
        templates["default"] = texts[_DEFAULT_FILE]
    for name, text in further.items():
        templates[PurePosixPath(name).name.removesuffix(_SUFFIX)] = text
    for name in texts:
        del files[name]
    names = ", ".join(PurePosixPath(name).name for name in list(further)[:5])
    more = ", …" if len(further) > 5 else ""
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return {**config, "chat_template": listed}, [
        f"{source}: {FOLDER} ({printable(names)}{more}): written with the default template as "
        "the list chat_template of tokenizer_config.json, which transformers 4 reads too"
    ]


def _listed(value: Any) -> dict[str, str]:
    """The templates in a config, by name."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {each["name"]: each["template"] for each in value}
    return dict(value or {})


def _text(raw: bytes, name: str, source: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise TokenizerError(
            f"{source}: {printable(name)} is not UTF-8; save the tokenizer again"
        ) from None
