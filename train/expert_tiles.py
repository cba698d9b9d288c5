"""Each token through its own experts only, none dropped: a third of the dense path's work.

MaxText's `dense_matmul` (layers/moe.py) computes every expert for every token and weighs most of
the results with zero. Here the tokens' choices are laid out in rows, expert by expert, each
expert's rows filled up to whole tiles, and every tile is multiplied with the weights of its expert,
in one batched matmul. A number of tiles that holds any routing is known beforehand, so nothing has
a capacity. Rows are moved by gathers only, forward and backward: no sum depends on an order.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from moeconv_train import seams
from moeconv_train.fp16_head import dot as rounded_dot

# Mesh axes that split the batch; any other would split an expert.
_BATCH_AXES = ("data", "fsdp")


class Layout(NamedTuple):
    """Which row each choice lies in; A choices (tokens times k), T tiles of R // T rows.

    Attributes:
        rows: [A] int32.
        choices: [R] int32, the inverse; A in rows that only fill up.
        experts: [T] int32, whose weights a tile is for.
    """

    rows: Any
    choices: Any
    experts: Any


@contextlib.contextmanager
def install() -> Iterator[None]:
    """While this is open, MaxText's dense MoE path (`sparse_matmul: false`) is traced in tiles."""
    from maxtext.layers.moe import RoutedMoE

    with seams.replaced(RoutedMoE, dense_matmul=_replacement(RoutedMoE.dense_matmul)):
        yield


def tile_for(choices: int, experts: int) -> int:
    """Rows of a tile: the power of two nearest below a quarter of an expert's share of choices.

    Larger ones are filled up more, smaller ones gather more weights.
    """
    share = max(8, choices // experts // 4)
    return 1 << (share.bit_length() - 1)


def tiles_for(choices: int, experts: int, tile: int) -> int:
    """As many as any routing can need: every expert's last tile may hold one row.

    A multiple of 8, which cuBLAS wants of the matmul that adds up their gradients.
    """
    most = max(choices - experts, 0) // tile + min(experts, choices)
    return -(-most // 8) * 8


def layout(chosen: Any, experts: int, tile: int) -> Layout:
    """The rows of choices [A], expert by expert in their own order."""
    count = chosen.shape[0]
    number = tiles_for(count, experts, tile)
    mine = (chosen[:, None] == jnp.arange(experts)).astype(jnp.int32)
    upto = jnp.cumsum(mine, axis=0)
    ends = jnp.cumsum(-(-upto[-1] // tile))
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    rows = jnp.sum(mine * (starts * tile + upto - 1), axis=1)
    # Ends come in order, so a tile's expert is the number of ends up to it.
    owners = jnp.sum(jnp.arange(number)[:, None] >= ends, axis=1)
    choices = jnp.full((number * tile,), count, jnp.int32)
    choices = choices.at[rows].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    return Layout(rows, choices, jnp.minimum(owners, experts - 1))


def moe(
    x: Any,
    weights: Any,
    indices: Any,
    kernels: tuple[Any, Any, Any],
    activation: Callable[[Any, Any], Any],
    *,
    tile: int | None = None,
    sum_dtype: Any = None,
    precision: Any = None,
) -> Any:
    """Sum over k of weights · expert(x), for tokens x [N, D]; weights and indices are [N, k].

    Args:
        x: The tokens.
        weights: Of each token's experts.
        indices: Of each token's experts.
        kernels: wi_0 and wi_1 [E, D, F], wo [E, F, D].
        activation: Of both hidden layers.
        tile: Rows of a tile; by default `tile_for`.
        sum_dtype: In which experts are added up; by default that of x.
        precision: Of the matmuls.
    """
    gate, up, down = kernels
    (tokens, k), experts = indices.shape, gate.shape[0]
    tile = tile or tile_for(tokens * k, experts)
    places = layout(indices.reshape(-1), experts, tile)

    def named(value: Any, name: str) -> Any:
        """As in `dense_matmul`, for remat_policy."""
        return checkpoint_name(checkpoint_name(value, name), f"moe_{name}")

    rows = _spread(x, places, k).reshape(-1, tile, x.shape[-1])
    hidden = activation(
        named(_matmul(rows, gate, places.experts, precision), "mlpwi_0"),
        named(_matmul(rows, up, places.experts, precision), "mlpwi_1"),
    )
    rows = named(_matmul(hidden, down, places.experts, precision), "mlpwo")
    results = _collect(rows.reshape(-1, x.shape[-1]), places).reshape(tokens, k, -1)
    dtype = sum_dtype or x.dtype
    total = jnp.einsum("nkd,nk->nd", results.astype(dtype), weights.astype(dtype))
    return total.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spread(x: Any, places: Layout, k: int) -> Any:
    """Tokens [N, D] to rows [R, D]; those that only fill up are zero, which cannot overflow."""
    return x.at[places.choices // k].get(mode="fill", fill_value=0)


def _spread_backward(k: int, places: Layout, cotangent: Any) -> tuple[Any, None]:
    parts = cotangent[places.rows].reshape(-1, k, cotangent.shape[-1])
    return parts.astype(jnp.float32).sum(1).astype(cotangent.dtype), None


_spread.defvjp(lambda x, places, k: (_spread(x, places, k), places), _spread_backward)


@jax.custom_vjp
def _collect(rows: Any, places: Layout) -> Any:
    """Rows [R, D] to choices [A, D]."""
    return rows[places.rows]


def _collect_backward(places: Layout, cotangent: Any) -> tuple[Any, None]:
    return cotangent.at[places.choices].get(mode="fill", fill_value=0), None


_collect.defvjp(lambda rows, places: (_collect(rows, places), places), _collect_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(rows: Any, kernel: Any, experts: Any, precision: Any) -> Any:
    """[T, t, D] and [E, D, F] to [T, t, F]."""
    return jnp.einsum("tnd,tdf->tnf", rows, kernel[experts], precision=precision)


def _matmul_forward(rows: Any, kernel: Any, experts: Any, precision: Any) -> tuple[Any, Any]:
    return _matmul(rows, kernel, experts, precision), (rows, kernel, experts)


def _matmul_backward(precision: Any, saved: Any, cotangent: Any) -> tuple[Any, Any, None]:
    rows, kernel, experts = saved
    dot = functools.partial(jnp.einsum, precision=precision)
    before = dot("tnf,tdf->tnd", cotangent, kernel[experts])
    # Each tile's share in its expert's gradient, added up as one more matmul.
    shares = dot("tnd,tnf->tdf", rows, cotangent)
    mine = (experts == jnp.arange(kernel.shape[0])[:, None]).astype(shares.dtype)
    if kernel.dtype == jnp.float16:
        total = rounded_dot(mine, shares, (((1,), (0,)), ((), ())), kernel.dtype)
    else:
        total = dot("et,tdf->edf", mine, shares, preferred_element_type=jnp.float32)
    return before, total.astype(kernel.dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`RoutedMoE.dense_matmul`: MaxText's own routing and balance loss, matmuls in tiles."""

    @functools.wraps(stock)
    def dense_matmul(
        self: Any,
        inputs: Any,
        gate_logits: Any,
        pre_bias_logits: Any,
        w0_kernel: Any,
        w1_kernel: Any,
        wo_kernel: Any,
        *_: Any,  # biases, which `_check` refuses
        **__: Any,
    ) -> tuple[Any, Any, None]:
        config = self.config
        _check(config, self.mesh)
        weights, indices = self.get_topk(gate_logits, pre_bias_logits, self.rngs)
        loss = None
        if config.load_balance_loss_weight > 0.0:
            probabilities = jax.nn.softmax(gate_logits.astype(jnp.float32), axis=-1)
            loss = self.load_balance_loss(indices, probabilities.astype(self.dtype))

        def local(x: Any, weights: Any, indices: Any, *kernels: *tuple[Any, Any, Any]) -> Any:
            tokens, shares, chosen = (p.reshape(-1, p.shape[-1]) for p in (x, weights, indices))
            result = moe(
                tokens,
                shares,
                chosen,
                kernels,
                self.apply_ffn_activation,
                sum_dtype=jnp.float32 if config.float32_weight_sum else None,
                precision=jax.lax.Precision(config.matmul_precision),
            )
            return result.reshape(x.shape)

        run = _on_each_device(local, self.mesh)
        return run(inputs, weights, indices, w0_kernel, w1_kernel, wo_kernel), loss, None

    return dense_matmul


def _on_each_device(function: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """Each device lays out its own tokens: three arrays split by batch, then whole kernels."""
    axes = tuple(axis for axis in _BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    if not axes:
        return function
    split, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(split, split, split, whole, whole, whole),
        out_specs=split,
        check_vma=False,
    )


def _check(config: Any, mesh: Any) -> None:
    """Refuses what tiles would compute differently."""
    wrong = {
        "capacity_factor": config.capacity_factor > 0,
        "mlp_bias": config.mlp_bias,
        "quantization": config.quantization,
        "use_random_routing": config.use_random_routing,
        "routed_bias": config.routed_bias,
        "shard_mode": seams.value(config.shard_mode) != "auto",
        "decoder_block": seams.value(config.decoder_block) not in ("mixtral", "envy"),
    }
    split = {
        f"ici_{axis}_parallelism": size > 1
        for axis, size in mesh.shape.items()
        if axis not in _BATCH_AXES
    }
    seams.refuse(wrong | split, "expert tiles", "run.patches.expert_tiles=false")
