"""Where two readings of a family differ: how far apart they are, which docs/families.md quotes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoints.gemma4 import DENSE, OWN_VALUES
from checkpoints.llama4 import LLAMA4
from checkpoints.olmo3 import OLMO3
from checkpoints.row import UNSCANNED
from helpers import run, tokens_for

from moeconv.families import targets

pytestmark = [pytest.mark.slow, pytest.mark.proof("departures of families"), pytest.mark.maxtext]
# Of the largest logit, in fp32.
CLOSE = 2e-5


def edit(out, **changes):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))


def logits(checkpoint, tokens, **changes) -> np.ndarray:
    """MaxText's own, under other settings."""
    from moeconv.verification.models.maxtext import MaxTextModel

    return MaxTextModel.load(checkpoint.items, {**checkpoint.config, **changes}).logits(tokens)


def apart(right: np.ndarray, out, tokens) -> float:
    """How far transformers' logits are from MaxText's, relative to the largest."""
    from moeconv.verification.models.transformers import HfModel

    found = HfModel.load(out).run(tokens)[0]
    return float(np.abs(found - right).max() / np.abs(right).max())


def test_olmo3_with_yarn_in_windows_is_not_what_was_published(maxtext_lab, tmp_path):
    """MaxText rotates every layer by YaRN; what was published, layers without a window only."""
    checkpoint, out = maxtext_lab.checkpoint(OLMO3), tmp_path / "out"
    manifest = run(checkpoint, out)
    assert any("vLLM" in text for text in manifest.warnings)
    tokens = tokens_for(checkpoint)
    right = logits(checkpoint, tokens)
    assert apart(right, out, tokens) <= CLOSE
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": rope["full_attention"]["rope_theta"]}
    edit(out, rope_parameters={**rope, "sliding_attention": plain})
    assert apart(right, out, tokens) > 0.01


def test_gemma4_under_another_name_is_rotated_otherwise(maxtext_lab, tmp_path):
    """It rotates a quarter of the global heads by halves of that quarter."""
    checkpoint, out = maxtext_lab.checkpoint(DENSE), tmp_path / "out"
    run(checkpoint, out)
    tokens = tokens_for(checkpoint)
    assert apart(logits(checkpoint, tokens), out, tokens) <= CLOSE
    assert apart(logits(checkpoint, tokens, model_name="default"), out, tokens) > 0.1


def test_a_gemma4_of_eight_layers_would_end_with_a_global_one(maxtext_lab, tmp_path, monkeypatch):
    """transformers makes it one, where sizes allow; so the target refuses what ends otherwise."""
    one_size = {**OWN_VALUES, "global_head_dim": 0, "base_num_decoder_layers": 8}
    checkpoint, out = maxtext_lab.checkpoint(DENSE, UNSCANNED, one_size), tmp_path / "out"
    lenient = replace(targets()["gemma4"], requires=lambda model: None)
    monkeypatch.setitem(targets(), "gemma4", lenient)
    run(checkpoint, out)
    tokens = tokens_for(checkpoint)
    assert apart(logits(checkpoint, tokens), out, tokens) > 0.1


LONG = {
    "max_target_length": 8448,
    "base_num_decoder_layers": 2,
    "base_emb_dim": 16,
    "base_num_query_heads": 1,
    "base_num_kv_heads": 1,
    "base_mlp_dim": 16,
    "base_moe_mlp_dim": 16,
    "nope_layer_interval": 2,
    "inhomogeneous_layer_cycle_interval": 2,
    "chunk_attn_window_size": 4096,
}


def test_llama4_tunes_its_temperature_from_position_8191(maxtext_lab, tmp_path):
    """Nothing shorter shows it: MaxText fixes the floor at 8,192 positions."""
    checkpoint, out = maxtext_lab.checkpoint(LLAMA4, LONG), tmp_path / "out"
    run(checkpoint, out)
    tokens = tokens_for(checkpoint)[:1]
    right = logits(checkpoint, tokens)
    assert apart(right, out, tokens) <= CLOSE
    edit(out, attn_temperature_tuning=False)
    assert apart(right, out, tokens) > 1e-3
