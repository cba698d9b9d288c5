"""The functions of MaxText that we replace, or that must do what they did: each by its source.

A patch of MaxText is right only for the code it was written against. `SOURCES` has the SHA-256 of
that code, of the pinned release; any other is refused before a run begins. After a new release has
been read and the patches fit it, `python tools/seams.py` prints the table anew.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from moeconv.errors import ConfigError, UnsupportedError

RELEASE = "0.2.5"

SOURCES: Mapping[str, str] = {
    "trainers.pre_train.train:loss_fn": "7a97c1cc3bd1b19ab90e7f36930dfc7e8187bb4ced227b2014488d213ba4253a",
    "trainers.pre_train.train:train_step": "e68464f0c15a65b7227e5c0f28d09cc1feecd94b9b5f90e06eb649cc8e7f9412",
    "trainers.pre_train.train:train_loop": "d4c7c722db956cb6efa8150bb497da1f9e80182fd2b4db3e6a07533ee6375515",
    "trainers.pre_train.train:training_loop_iteration": "d649a852204a918a0a0f95f545655faccd420dcff55c6a8322a3ff60bb7048c6",
    "optimizers.optimizers:get_optimizer": "cc6c85a6e9c9e15cd3a28bf353460e20299aaf3eedb8d0dcc126a322edba7b79",
    "utils.train_utils:create_training_optimizer": "499358af980a97cee178fb941b5bcdf7bc522fa091cf7681ce3ec55a66f5743e",
    "common.metric_logger:MetricLogger.__init__": "a02bfae478f4fcd384668d42aa3401a9c2c65ff0875bbaeb606d25a374a0da7e",
    "common.metric_logger:MetricLogger.write_metrics": "9fed5b88e209850e9af5102a0aafe29d6b57d9cf057a884a7d894e3e9f95e660",
    "common.metric_logger:MetricLogger.buffer_and_write_metrics": "ed621dfd0a87d2392e9bb27d0137a96d204aa2ebcd212eed9fa828c5dc01a01d",
    "common.metric_logger:MetricLogger._flush_one_buffered_entry": "cca0082ce48cec01561b674172a121d12d7ad8df1cdd43ca920d3dd627a53ce2",
    "common.metric_logger:MetricLogger._finalize_eval_metrics": "b68984d7df104b0a1898d2b437e9ff46ae5d80194ffb9819119b65108644eeca",
    "common.metric_logger:MetricLogger.mark_eval_loop_start": "44cff4543f3d341fac335696a397b020b6a0880aef7e1a5d6154aa49b32b78d2",
    "common.metric_logger:MetricLogger._maybe_abort_after_write_metrics": "89e10a68dc81d2ebac614894223829a08486cc9182b72c1a597df1680621053d",
    "common.data_loader:DataLoader.load_next_batch": "afcf369882dadcce7164dd85c939d18be7a3417f6f06df3b1f62948daa40c698",
    "common.checkpointing:maybe_save_checkpoint": "c9ec828e8728deb37e303dd95b1cb85992a13e6e031846f07ada19c67eeb183c",
    "common.checkpointing:save_checkpoint": "251902bcdd93f422a0a6b7125e06b093e4be8a861f4e6d3c9164b44c2bd33d29",
    "layers.embeddings:attend_on_embedding": "2a44f14ceb3b061a87f581a1d8674ff28b26172bc31b9c3214aff499ce69bdbb",
    "layers.embeddings:Embed.__call__": "c327e05dc86c1caa5abec939257fb8e56e415cdd48272d811912f78a7d7cbfbb",
    "layers.nnx_decoders:NNXDecoder.apply_output_head": "5476cfa81728072f4bd9cb54d6bc243954a972e91cad0329199e8439f4363314",
    "layers.moe:RoutedMoE.dense_matmul": "63f74a7fa0b18d50c3bf75bdb5919fe8b5db179a3a6ea4a9de7a7aa4f0e165ee",
    "layers.attention_op:AttentionOp.apply_attention_dot": "ebe2d6ea229d4a636de2a14f1e86be06b377257e3d086da2ea32aa49df735d9d",
    "layers.attention_op:AttentionOp.__call__": "f949a3c98e12dc86693faf805e9d89a6b26a8816bb268b2e45187fb9a58f5f84",
    "input_pipeline.grain_data_processing:find_data_files": "4df03f5a6fb109cdd9fbe5f638ca113ed78fa93007c6c54f5cdf28d090a8cc82",
    "input_pipeline.grain_data_processing:get_datasets": "4716ea6c53f3e8a2c3f8d6a15791c9ecfcef58449dc922e4206b9ecf93c6877d",
    "input_pipeline.grain_data_processing:_get_pipeline_fn": "552c80b3702ce16ef4f484567b636cc41844c5d810bba39e5744efab92bcb5c0",
    "input_pipeline.grain_data_processing:_apply_mapdataset_transforms": "b07f9bd324e79156726a655356117de431f4a757a74cd34ee558923ea850d16e",
    "input_pipeline.grain_data_processing:pretrain_preprocessing_pipeline": "c7152da9b384afc8d3561f040d7d5feab76f50c311f96aabb04ed3ffb819c6e8",
}


def check(*modules: str) -> None:
    """Refuses a MaxText whose functions are not those that `SOURCES` has.

    Args:
        modules: Where they are, such as `layers.moe`; by default all.

    Raises:
        UnsupportedError: One of them is another, or is gone.
    """
    changed = [
        name
        for name, digest in SOURCES.items()
        if name.startswith(modules or "") and digest_of(name) != digest
    ]
    if changed:
        raise UnsupportedError(
            f"MaxText {importlib.metadata.version('maxtext')} has another {changed[0]} than "
            f"{RELEASE}, which moeconv changes for training; install maxtext=={RELEASE}"
        )


def digest_of(name: str) -> str | None:
    """The SHA-256 of a function's source, without our own wrappers; None if there is none."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(f"maxtext.{module}")
    for part in path.split("."):
        found = getattr(found, part, None)
    if not inspect.isroutine(found):
        return None
    return hashlib.sha256(inspect.getsource(inspect.unwrap(found)).encode()).hexdigest()


@contextlib.contextmanager
def replaced(owner: Any, **functions: Any) -> Iterator[None]:
    """Sets attributes of `owner`, and puts the old ones back at the end."""
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def value(setting: Any) -> Any:
    """A setting of MaxText's, of an enum its value."""
    return getattr(setting, "value", setting)


def refuse(wrong: Mapping[str, Any], what: str, off: str) -> None:
    """Refuses settings under which MaxText's own function does something that ours does not.

    Args:
        wrong: By name, whether a setting is such a one.
        what: Ours.
        off: The words that turn it off.

    Raises:
        ConfigError: One of them is.
    """
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"{', '.join(names)} does not go with {what}; change it, or set {off}")
