"""The tokenizer that a run's sidecar names: in the run, on this machine or at its address."""

from moeconv.errors import NotACheckpointError, TokenizerError
from moeconv.hf.tokenizer import TEMPLATES_FOLDER, TokenizerFiles, read_files, tokenizer_of
from moeconv.maxtext.sidecar import FoundSidecar
from moeconv.orbax.locate import read_beside
from moeconv.orbax.store import Folder


def run_tokenizer(sidecar: FoundSidecar, *, model_max_length: int | None) -> TokenizerFiles:
    """The tokenizer that a run's sidecar names, which is in the run, here or at its address.

    Raises:
        TokenizerError: It is outside, cannot be read, or cannot be used.
    """
    name, run = sidecar.content.tokenizer, sidecar.folder
    assert name is not None
    source = str(run / name)
    try:
        files = read_files(
            lambda each, limit: read_beside(run, f"{name}/{each}", limit=limit),
            source,
            _templates(run / name),
        )
    except NotACheckpointError as error:
        raise TokenizerError(
            f"{error} ({sidecar.path} names it); give the tokenizer with --tokenizer"
        ) from None
    if not files:
        raise TokenizerError(
            f"{source}: no such file or directory with a tokenizer, but {sidecar.path} names "
            "it; give the tokenizer with --tokenizer"
        )
    return tokenizer_of(files, source, "directory", model_max_length=model_max_length)


def _templates(folder: Folder) -> list[str]:
    """Names of a tokenizer's further chat templates; of a store that lists nothing none."""
    try:
        names = list((folder / TEMPLATES_FOLDER).children())
    except NotACheckpointError:
        return []
    return [f"{TEMPLATES_FOLDER}/{name}" for name in names if name.endswith(".jinja")]
