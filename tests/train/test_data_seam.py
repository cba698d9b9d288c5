"""Where packed rows enter MaxText, and what its model makes of them."""

import numpy as np
import pytest
from moeconv_train import seams
from moeconv_train.data import packed
from moeconv_train.data.packing import pack

from moeconv.errors import UnsupportedError

pytest.importorskip("maxtext")

# MaxText's own clean-up stumbles over a finished iterator (multihost_dataloading.py, `__del__`).
pytestmark = [
    pytest.mark.maxtext,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_the_seam_leaves_maxtext_as_it_was():
    from maxtext.input_pipeline import grain_data_processing as pipeline

    before = (pipeline.find_data_files, pipeline.pretrain_preprocessing_pipeline)
    with pytest.raises(KeyError), packed.reading():
        assert pipeline.pretrain_preprocessing_pipeline is not before[1]
        raise KeyError
    assert (pipeline.find_data_files, pipeline.pretrain_preprocessing_pipeline) == before


def test_a_maxtext_that_has_moved_on_is_refused(monkeypatch):
    with pytest.raises(UnsupportedError, match="read no prepared rows"), packed.reading():
        pass
    monkeypatch.setattr(seams, "SOURCES", {"input_pipeline/grain_data_processing.py": "0" * 64})
    with pytest.raises(UnsupportedError, match="has another input_pipeline"), packed.reading():
        pass


def test_a_packed_story_has_the_logits_that_it_has_alone(maxtext_lab):
    """The whole point: in MaxText's own model no story sees another in its row."""
    import jax
    import jax.numpy as jnp
    from checkpoints.mixtral import MIXTRAL
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from moeconv_train.data.packing import unpack

    from moeconv.verification.models.maxtext import MaxTextModel

    checkpoint = maxtext_lab.checkpoint(MIXTRAL)
    model = MaxTextModel.load(checkpoint.items, checkpoint.config)
    stories = [
        np.random.default_rng(i).integers(0, 160, n) for i, n in enumerate((20, 12, 12, 12))
    ]  # two lengths: each compiles anew
    (row,) = pack(stories, 64)
    columns = unpack({name: np.asarray(values) for name, values in row.items()}, 64)
    forward = jax.jit(
        lambda state, batch: nnx.merge(model._graph, state)(
            decoder_input_tokens=batch["inputs"],
            decoder_positions=batch["inputs_position"],
            decoder_segment_ids=batch["inputs_segmentation"],
            enable_dropout=False,
        )
    )
    rules = logical_axis_rules(model.config.logical_axis_rules)
    with jax.set_mesh(model._mesh), rules, jax.default_matmul_precision("highest"):
        batch = {name: jnp.asarray(values[None]) for name, values in columns.items()}
        together = np.asarray(forward(model._state, batch), np.float32)[0]
    for segment, story in enumerate(stories, 1):
        alone = model.logits(story[None, :-1])[0]
        at = columns["inputs_segmentation"] == segment
        np.testing.assert_allclose(together[at], alone, atol=2e-5, rtol=0)
    # And it would be seen if they did: as one segment the later stories' logits are others.
    one = model.logits(columns["inputs"][None])[0]
    at = columns["inputs_segmentation"] == 3
    assert np.abs(one[at] - together[at]).max() > 0.05
