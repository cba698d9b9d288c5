"""Datasets on the Hugging Face Hub: which files they have, and fetching them one at a time."""

import os
from collections.abc import Mapping
from pathlib import Path

from moeconv_train.data.manifest import SPLITS, Source, SourceFile
from moeconv_train.data.records import sha256
from moeconv_train.data.source import choose
from moeconv_train.words import first_line

from moeconv.errors import StorageError, UsageError


def hub_source(
    repo_id: str,
    *,
    revision: str | None,
    column: str,
    separator: str,
    patterns: Mapping[str, str],
) -> Source:
    """Describes a dataset at the commit that `revision` names now.

    `HF_TOKEN` and `HF_ENDPOINT` are taken from the environment by huggingface_hub.

    Raises:
        StorageError: The Hub does not answer, or not with this dataset.
        UsageError: It has no files that can be read.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repo_id, revision=revision, files_metadata=True)
    except Exception as error:  # its transport's own errors have no stable name to catch
        raise _failure(repo_id, revision, error) from error
    found = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    chosen = choose(found, patterns, f"{repo_id} on the Hub")
    files = tuple(
        SourceFile(
            path=name,
            size=found[name].size,
            digest=found[name].lfs.sha256 if found[name].lfs else found[name].blob_id,
            split=split,
        )
        for split in SPLITS
        for name in chosen.get(split, ())
    )
    return Source(
        kind="hub",
        name=repo_id,
        revision=info.sha,
        column=column,
        separator=separator,
        files=files,
    )


def fetch(source: Source, file: SourceFile, directory: Path, *, quiet: bool) -> Path:
    """Downloads one file of a dataset below `directory`; a broken download goes on.

    Raises:
        StorageError: It cannot be fetched, or is not what the Hub lists.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (disable_progress_bars if quiet else enable_progress_bars)()
    try:
        path = Path(
            hf_hub_download(
                source.name,
                file.path,
                repo_type="dataset",
                revision=source.revision,
                local_dir=directory,
            )
        )
    except Exception as error:
        raise _failure(source.name, source.revision, error, file.path) from error
    # A digest of another length is git's, of a small file that is no LFS object.
    is_sha256 = file.digest is not None and len(file.digest) == 64
    if path.stat().st_size != file.size or (is_sha256 and sha256(path) != file.digest):
        path.unlink()
        raise StorageError(
            f"{source.name}: {file.path} did not arrive as the Hub lists it; run the same command "
            "again to fetch it anew"
        )
    return path


def _failure(
    repo_id: str, revision: str | None, error: Exception, file: str | None = None
) -> StorageError | UsageError:
    """The one sentence for what went wrong; a token is never part of it."""
    from huggingface_hub import constants, errors

    chain = [error, error.__cause__, error.__context__]
    answered = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    status = answered.response.status_code if answered is not None else None
    page = f"{constants.ENDPOINT}/datasets/{repo_id}"
    told = bool(os.environ.get("HF_TOKEN"))
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return StorageError(
            f"{repo_id}: no such file or folder, and with HF_HUB_OFFLINE set the Hub is not asked; "
            "unset it, or give local files"
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(
            f"{repo_id}: no such file or folder, and not the id of a dataset on the Hub (name or "
            "namespace/name)"
        )
    if isinstance(answered, errors.GatedRepoError):
        return StorageError(
            f"{repo_id}: this dataset is gated; accept its terms on {page}, and set HF_TOKEN to a "
            "token of the account that did"
        )
    if isinstance(answered, errors.RevisionNotFoundError):
        return StorageError(f"{repo_id}: has no revision {revision}; see {page}")
    if isinstance(answered, errors.RepositoryNotFoundError):
        return StorageError(
            f"{repo_id}: no such file or folder, and no dataset on the Hub that you may read; "
            f"check the id, and if it is private set HF_TOKEN{' to one that may read it' * told}"
        )
    if status in (401, 403):
        return StorageError(
            f"{repo_id}: the Hub refuses {'your token' if told else 'to answer without a token'} "
            f"({status}); set HF_TOKEN to a token that may read this dataset"
        )
    if status is not None:
        return StorageError(f"{repo_id}: the Hub answers with {status}; try again later")
    if file is not None:
        return StorageError(
            f"{repo_id}: {file} could not be fetched ({first_line(error)}); "
            "run the same command again to go on"
        )
    return StorageError(
        f"{repo_id}: no such file or folder, and the Hub at {constants.ENDPOINT} cannot be reached "
        f"({first_line(error)}); check the network, or give local files"
    )
