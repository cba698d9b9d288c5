"""What the conversion tests share: a config file for a lab checkpoint, and the parity check."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from moeconv.artifact.manifest import Manifest
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion

# How much further than transformers' own fp32 MaxText's may be from the exact logits.
PARITY = 3.0

# Sizes, devices and storage are not told: shapes and the checkpoint itself tell them.
_NOT_TOLD = ("base_", "ici_", "checkpoint_", "weight_dtype", "head_dim", "vocab_size", "dtype")


def config_file(folder: Path, config: Mapping[str, object]) -> Path:
    """The run's YAML, with what shapes cannot tell."""
    told = {k: v for k, v in config.items() if not k.startswith(_NOT_TOLD)}
    if "model_name" in told:  # of a resolved config, whose keys win over the model's file
        told["emb_dim"] = config["base_emb_dim"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(told))
    return path


def run(checkpoint, out: Path, **options) -> Manifest:
    """Converts a lab checkpoint."""
    config = config_file(out.parent / f"{out.name}-config", checkpoint.config)
    prepared = plan_conversion(
        str(checkpoint.step_dir), ConvertOptions(config=config, **{"jobs": 2, **options})
    )
    return convert(prepared, out)


def tokens_for(checkpoint, seed: int = 7) -> np.ndarray:
    """Two rows of random ids over the whole vocabulary, as long as the model's context."""
    vocab, length = checkpoint.resolved["vocab_size"], checkpoint.resolved["max_target_length"]
    return np.random.default_rng(seed).integers(0, vocab, (2, length)).astype(np.int32)


def reference(checkpoint) -> np.ndarray:
    """MaxText's own logits of `tokens_for`, with the head unrounded; computed once a session."""
    from moeconv.verification.models.maxtext import MaxTextModel

    if checkpoint.items not in _REFERENCES:
        model = MaxTextModel.load(checkpoint.items, checkpoint.config)
        _REFERENCES[checkpoint.items] = model.logits(tokens_for(checkpoint), head="unrounded")
    return _REFERENCES[checkpoint.items]


# By the folder that holds the parameters, which the lab writes once.
_REFERENCES: dict[Path, np.ndarray] = {}


def assert_same_model(checkpoint, out: Path) -> None:
    """The converted model in transformers gives MaxText's logits."""
    assert_same_logits(out, tokens_for(checkpoint), reference(checkpoint))


def assert_same_logits(out: Path, tokens: np.ndarray, expected: np.ndarray) -> None:
    """MaxText's fp32 logits are those of the converted model in float64, to fp32's own error.

    That error is measured: it is what transformers in fp32 does to the same model, between 4e-6
    and 2e-5 on these models of logits of std about 1. A mistake moves them by 0.1 and more.
    """
    import torch

    from moeconv.verification.models.transformers import HfModel

    assert 0.3 < expected.std() < 30, "the test model must have logits that mistakes would move"
    model = HfModel.load(out)
    single = model.run(tokens)[0]
    model._model.to(torch.float64)
    exact = model.run(tokens)[0]
    rounding = np.abs(single - exact).max()
    assert rounding < 1e-4, "fp32 is further from float64 than any order of sums explains"
    assert np.abs(expected - exact).max() <= PARITY * rounding
