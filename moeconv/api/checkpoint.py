"""`moeconv.open_checkpoint`: what a checkpoint or a model holds, and what is not known of it."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeconv.api.arguments import Fields, StrPath, optional_path, pairs_of

if TYPE_CHECKING:
    from moeconv.conversion.inspected import Model
    from moeconv.maxtext.adapter import Adapter
    from moeconv.maxtext.checkpoint import Checkpoint


def open_checkpoint(
    path_or_url: StrPath,
    *,
    config: StrPath | None = None,
    set: Fields = (),
    accept_keys: Sequence[str] = (),
) -> "Checkpoint | Adapter | Model":
    """Opens a MaxText checkpoint or a Hugging Face model and reads its metadata.

    Args:
        path_or_url: A run directory, its `checkpoints/`, a step, a step's `items/`, or a `gs://`,
            `s3://` or `http://` address of one; the newest complete step is taken unless one is
            named. Or the folder of a Hugging Face model, or `hf://namespace/name[@revision]`.
        config: MaxText YAML of the run; keys it leaves out have MaxText's defaults. Without it the
            run's `moeconv_run.json` is looked for beside the checkpoint.
        set: Fields by their MaxText names, over `config`: `{"rope_max_timescale": 500000}`, or
            `["rope_max_timescale=500000"]`, or a whole command line of MaxText.
        accept_keys: Settings in the run's config that moeconv does not know, and that do not change
            the model.

    Returns:
        The checkpoint, the LoRA adapter where it holds that alone, or the model. `print` shows it
        as `moeconv inspect` does, `as_dict()` is the same as data.

    Raises:
        NotACheckpointError: There is no complete checkpoint.
        ConfigError: The config cannot be read, or contradicts the shapes.
        TensorError: Parameters are missing, unknown or inconsistent.
        UnsupportedError: The decoder block or a dtype is not supported.
        UsageError: `config` or `set` is given for a Hugging Face model, which has its own.
        StorageError: The store does not answer.
    """
    from moeconv.conversion.inspected import inspect_model
    from moeconv.maxtext.adapter import open_any

    described = config is not None or bool(pairs_of(set))
    model = inspect_model(os.fspath(path_or_url), accept=accept_keys, others=described)
    if model is not None:
        return model
    return open_any(
        os.fspath(path_or_url),
        config=optional_path(config),
        sets=pairs_of(set),
        accept=tuple(accept_keys),
    )
