"""Experts in tiles against every expert for every token: the same result, the same gradient."""

from types import SimpleNamespace

import _hlo as hlo
import numpy as np
import pytest
from moeconv_train import expert_tiles

from moeconv.errors import ConfigError

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


def test_a_part_of_the_work_is_left_out():
    """Every matmul of both passes has the tiles' rows, not every token's for every expert."""
    import jax
    import jax.numpy as jnp

    tokens, tile = 256, 16
    shapes = ((tokens, D), (tokens, K), (E, D, F), (E, D, F), (E, F, D))
    x, weights, *kernels = (jnp.ones(shape, jnp.float32) for shape in shapes)
    indices = jnp.zeros((tokens, K), jnp.int32)

    def ours(x, weights, kernels):
        return expert_tiles.moe(x, weights, indices, kernels, jnp.multiply, tile=tile).sum()

    step = jax.jit(jax.grad(ours, argnums=(0, 1, 2))).lower(x, weights, tuple(kernels))
    found = sum(hlo.count(step.compile().as_text()).flops.values())
    tiles = expert_tiles.tiles_for(tokens * K, E, tile)
    # Three kernels, each three times over, and tiles' gradients added up.
    assert found == pytest.approx(2 * 3 * D * F * (3 * tiles * tile + E * tiles), rel=0.02)
    assert tiles * tile < 0.7 * tokens * E


def test_it_is_put_back():
    from maxtext.layers.moe import RoutedMoE

    stock = RoutedMoE.dense_matmul
    with pytest.raises(KeyError), expert_tiles.install():
        assert RoutedMoE.dense_matmul is not stock
        raise KeyError
    assert RoutedMoE.dense_matmul is stock


def fits(**other):
    """What `dense_matmul` is asked with, as far as tiles look at it."""
    keys = {
        "capacity_factor": -1.0,
        "mlp_bias": False,
        "quantization": "",
        "use_random_routing": False,
        "routed_bias": False,
        "shard_mode": "auto",
        "decoder_block": "envy",
    }
    config = SimpleNamespace(**{**keys, **other})
    return SimpleNamespace(config=config, mesh=SimpleNamespace(shape={"data": 2}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("capacity_factor", 1.0),
        ("mlp_bias", True),
        ("quantization", "int8"),
        ("use_random_routing", True),
        ("routed_bias", True),
        ("shard_mode", "explicit"),
        ("decoder_block", "deepseek"),
    ],
)
def test_what_does_not_go_with_tiles_is_refused(key, value):
    from maxtext.layers.moe import RoutedMoE

    with expert_tiles.install():
        tiled = RoutedMoE.dense_matmul
    with pytest.raises(ConfigError, match=f"^{key} does not go with expert tiles; "):
        tiled(fits(**{key: value}), *[None] * 9)
    wrong = fits()
    wrong.mesh.shape["tensor"] = 2
    with pytest.raises(ConfigError, match=r"^ici_tensor_parallelism does not go"):
        tiled(wrong, *[None] * 9)
