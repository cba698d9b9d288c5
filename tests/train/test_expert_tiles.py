"""Experts in tiles against every expert for every token: the same result, the same gradient."""

from types import SimpleNamespace

import _hlo as hlo
import fp16_lab
import numpy as np
import pytest
from moeconv_train import expert_tiles

from moeconv.errors import ConfigError, UnsupportedError

# Of what is off unless asked for.
pytestmark = [pytest.mark.maxtext, pytest.mark.proof("expert tiles")]

E, D, F, K = 4, 16, 24, 2
# Tokens' first expert, then their second: evenly drawn, all on two, one alone on the last.
ROUTINGS = {
    "drawn": lambda draw, n: np.argsort(draw.random((n, E)), axis=1)[:, :K],
    "crowded": lambda draw, n: np.tile([1, 3], (n, 1)),
    "one token alone": lambda draw, n: np.vstack([np.tile([0, 1], (n - 1, 1)), [[3, 0]]]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "tile"), [(64, 8), (50, 16), (5, 8), (64, 256)])
def test_every_choice_has_a_row_in_a_tile_of_its_expert(routing, tokens, tile):
    chosen = ROUTINGS[routing](np.random.default_rng(0), tokens).reshape(-1).astype(np.int32)
    places = expert_tiles.layout(chosen, E, tile)
    rows, choices, experts = map(np.asarray, places)
    assert len(choices) == len(experts) * tile
    assert len(experts) == expert_tiles.tiles_for(len(chosen), E, tile)
    assert len(set(rows)) == len(chosen) and rows.min() >= 0
    np.testing.assert_array_equal(experts[rows // tile], chosen)
    np.testing.assert_array_equal(choices[rows], np.arange(len(chosen)))
    assert np.sum(choices == len(chosen)) == len(choices) - len(chosen)


def test_tiles_suffice_for_the_worst_routing():
    """Every expert one row more than whole tiles."""
    tile = 8
    counts = [tile + 1, 2 * tile + 1, 1, 5 * tile + 1]
    chosen = np.repeat(np.arange(E, dtype=np.int32), counts)
    needed = sum(-(-count // tile) for count in counts)
    assert needed == 12 == (len(chosen) - E) // tile + E
    assert expert_tiles.tiles_for(len(chosen), E, tile) == 16  # a multiple of 8
    rows, _, experts = map(np.asarray, expert_tiles.layout(chosen, E, tile))
    np.testing.assert_array_equal(experts[rows // tile], chosen)


def test_the_tile_is_a_quarter_of_a_share():
    assert expert_tiles.tile_for(16_384, 8) == 512  # the recipe's, on each of its GPUs
    assert expert_tiles.tile_for(8, 8) == 8


def dense(x, weights, indices, kernels, activation):
    """As MaxText's `dense_matmul`: all experts, most of them weighed with zero."""
    import jax.numpy as jnp

    gate, up, down = kernels
    share = jnp.zeros((x.shape[0], E)).at[jnp.arange(x.shape[0])[:, None], indices].set(weights)
    hidden = activation(*(jnp.einsum("nd,edf->nef", x, kernel) for kernel in (gate, up)))
    return jnp.einsum("nef,efd,ne->nd", hidden, down, share)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tile", [8, 32])
def test_results_and_gradients_are_those_of_all_experts(routing, tile):
    import jax
    import jax.numpy as jnp

    draw, tokens = np.random.default_rng(1), 50
    x = jnp.asarray(draw.standard_normal((tokens, D)), jnp.float32)
    weights = jnp.asarray(draw.random((tokens, K)), jnp.float32)
    indices = jnp.asarray(ROUTINGS[routing](draw, tokens), jnp.int32)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    kernels = tuple(jnp.asarray(draw.standard_normal(s), jnp.float32) for s in shapes)
    cotangent = jnp.asarray(draw.standard_normal((tokens, D)), jnp.float32)

    def activation(gate, up):
        return jax.nn.silu(gate) * up

    def ours(x, weights, kernels):
        return expert_tiles.moe(x, weights, indices, kernels, activation, tile=tile)

    def reference(x, weights, kernels):
        return dense(x, weights, indices, kernels, activation)

    found, back = jax.vjp(jax.jit(ours), x, weights, kernels)
    expected, expected_back = jax.vjp(jax.jit(reference), x, weights, kernels)
    for a, b in zip(
        jax.tree.leaves((found, back(cotangent))),
        jax.tree.leaves((expected, expected_back(cotangent))),
        strict=True,
    ):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_maxtexts_step_has_the_same_loss_and_gradient(tmp_path):
    """In fp32; test_cheaper_step.py has fp16."""
    keys = {
        **fp16_lab.FP32,
        "base_num_decoder_layers": 2,
        "gradient_clipping_threshold": 0.0,
        "num_experts": 8,
    }
    stock = fp16_lab.Stepper.make(keys, tmp_path)
    expected = stock.gradient()
    loss = stock.step(seed=1)
    with expert_tiles.install():
        tiled = fp16_lab.Stepper.make(keys, tmp_path)
        found = tiled.gradient()
    assert fp16_lab.error(found, expected) < 2e-6
    for name, value in tiled.step(seed=1).items():
        assert value == pytest.approx(loss[name], rel=2e-5), name
    # 2560 rows, filled up, instead of 1024 tokens times 8 experts; nine matmuls, and as remat is
    # full, those of the forward pass again.
    dense, ours = (
        sum(hlo.count(each.compiled.as_text()).flops.values()) for each in (stock, tiled)
    )
    saved = 12 * 2 * (1024 * 8 - 2560) * 48 * 96
    added = 3 * 2 * 8 * 40 * 48 * 96  # tiles' gradients added up
    assert dense - ours == pytest.approx(saved - added, rel=5e-3)


def test_it_is_put_back_and_another_maxtext_is_refused(monkeypatch):
    from maxtext.layers.moe import RoutedMoE

    stock = RoutedMoE.dense_matmul
    with pytest.raises(KeyError), expert_tiles.install():
        assert RoutedMoE.dense_matmul is not stock
        raise KeyError
    assert RoutedMoE.dense_matmul is stock
    monkeypatch.setattr(RoutedMoE, "dense_matmul", lambda self, inputs: None)
    with pytest.raises(UnsupportedError, match=r"maxtext==0\.2\.5"), expert_tiles.install():
        pass


def test_what_does_not_go_with_tiles_is_refused(tmp_path):
    keys = {**fp16_lab.FP32, "base_num_decoder_layers": 2}
    capacity = pytest.raises(ConfigError, match=r"capacity_factor: 1\.0 does not go")
    with expert_tiles.install(), capacity:
        fp16_lab.Stepper.make({**keys, "capacity_factor": 1.0}, tmp_path).compile()
    mesh = SimpleNamespace(shape={"data": 2, "tensor": 2})
    with pytest.raises(ConfigError, match="2 devices along 'tensor'"):
        expert_tiles._check(fp16_lab.resolve(keys, tmp_path), mesh)
