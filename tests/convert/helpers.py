"""What the conversion tests share: a config file for a lab checkpoint, and the parity check."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from moeconv.convert.api import ConvertOptions, convert, plan_conversion
from moeconv.convert.manifest import Manifest

# The largest difference of logits of std about 1 that fp32 arithmetic in another order leaves.
PARITY = 2e-5

# Sizes, devices and storage are not told: shapes and the checkpoint itself tell them.
_NOT_TOLD = ("base_", "ici_", "checkpoint_", "weight_dtype", "head_dim", "vocab_size", "dtype")


def config_file(folder: Path, config: Mapping[str, object]) -> Path:
    """The run's YAML, with what shapes cannot tell."""
    told = {k: v for k, v in config.items() if not k.startswith(_NOT_TOLD)}
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


def reference(checkpoint, tokens: np.ndarray, head: str = "unrounded") -> np.ndarray:
    """MaxText's own logits."""
    from moeconv.verify.maxtext import MaxTextModel

    model = MaxTextModel.load(checkpoint.items, checkpoint.config)
    return model.logits(tokens, head=head)


def assert_same_model(checkpoint, out: Path, limit: float = PARITY) -> None:
    """The converted model in transformers gives MaxText's logits."""
    from moeconv.verify.hf_model import hf_logits

    tokens = tokens_for(checkpoint)
    expected = reference(checkpoint, tokens)
    assert 0.3 < expected.std() < 30, "the test model must have logits that mistakes would move"
    actual = hf_logits(out, tokens)
    assert np.abs(expected - actual).max() <= limit
