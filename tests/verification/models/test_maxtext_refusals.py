"""What MaxText's forward cannot evaluate is an error."""

import numpy as np
import pytest
from checkpoints.mixtral import MIXTRAL
from checkpoints.row import TIED
from dense import TOKENS

from moeconv.errors import (
    ConfigError,
    NotACheckpointError,
    TensorError,
    UnsupportedError,
    UsageError,
)
from moeconv.verification.models.maxtext import MaxTextModel


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scan_layers": False}, TensorError, "layers_0/MoeBlock_0"),
        ({"base_emb_dim": 64}, TensorError, "decoder_norm/scale"),
        ({"logits_via_embedding": True}, TensorError, r"decoder\.logits_dense\.kernel"),
        ({"decoder_block": "mixtrl"}, ConfigError, "decoder_block"),
        ({"emb_dim": 64}, ConfigError, "emb_dim: 64 given, 48 derived"),
        ({"quantization": "int8"}, UnsupportedError, "int8"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(maxtext_lab, change, error, message):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    with pytest.raises(error, match=message):
        MaxTextModel.load(checkpoint.items, {**checkpoint.config, **change})


def test_not_a_checkpoint(maxtext_lab, tmp_path):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    for path in (tmp_path / "absent", tmp_path, checkpoint.step_dir):
        with pytest.raises(NotACheckpointError, match="_METADATA"):
            MaxTextModel.load(path, checkpoint.config)


def test_bad_tokens_are_refused(maxtext_lab):
    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    model = MaxTextModel.load(checkpoint.items, checkpoint.config)
    for tokens in ([[0, 160]], [[-1, 0]], [0, 1], [[0.0, 1.0]]):
        with pytest.raises(UsageError, match="Tokens"):
            model.logits(np.array(tokens))


def test_a_moved_seam_is_an_error(maxtext_lab, monkeypatch):
    from maxtext.layers import embeddings, nnx_decoders

    checkpoint = maxtext_lab.checkpoint(MIXTRAL, TIED, {"base_num_decoder_layers": 1})
    stock = embeddings.attend_on_embedding

    def attend_on_embedding(*args):
        return stock(*args)

    for modules in ((embeddings,), (nnx_decoders,), (embeddings, nnx_decoders)):
        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, "attend_on_embedding", attend_on_embedding)
            model = MaxTextModel.load(checkpoint.items, checkpoint.config)
            with pytest.raises(UnsupportedError, match="rounding to bfloat16"):
                model.logits(TOKENS, head="unrounded")
            model.logits(TOKENS)
    # A decoder that does not pass by the seam at all.
    with monkeypatch.context() as patch:
        patch.setattr(
            nnx_decoders.NNXDecoder,
            "apply_output_head",
            lambda self, shared_embedding, y, *_: y @ shared_embedding.embedding[...].T,
        )
        model = MaxTextModel.load(checkpoint.items, checkpoint.config)
        with pytest.raises(UnsupportedError, match="rounding to bfloat16"):
            model.logits(TOKENS, head="unrounded")
    assert nnx_decoders.attend_on_embedding is stock
