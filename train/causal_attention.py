"""Dot-product attention in blocks of queries: half of MaxText's work, and its matmuls in FP16.

MaxText's `apply_attention_dot` (layers/attention_op.py) multiplies every query with every key,
masks the future away, and with `float32_logits` multiplies weights and values in fp32, which a T4
does at an eighth of the speed. Here a block of queries meets only the keys up to its last one, and
both matmuls take operands of `dtype` and add up in fp32; the softmax between them is in fp32 as
before. The backward pass computes the weights again from their logarithmic sum, so that no
square of the length is kept. Plain XLA: a T4 has no flash attention that JAX could call.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from moeconv_train import seams

# Arguments of `apply_attention_dot` that change its function, and attributes of the layer that do.
_ARGUMENTS = ("previous_chunk", "bidirectional_mask", "sinks", "indexer_mask", "compressed_mask")
_ATTRIBUTES = ("attn_logits_soft_cap", "float32_qk_product", "kv_quant", "is_absorbed_mqa")
BLOCK = 512  # queries


@contextlib.contextmanager
def install(block: int = BLOCK) -> Iterator[None]:
    """While this is open, MaxText traces `attention: dot_product` of training in blocks."""
    from maxtext.layers.attention_op import AttentionOp

    blocks = _replacement(AttentionOp.apply_attention_dot, block)
    with seams.replaced(AttentionOp, apply_attention_dot=blocks):
        yield


def _replacement(stock: Callable[..., Any], block: int) -> Callable[..., Any]:
    """`apply_attention_dot`, another one for training only."""

    @functools.wraps(stock)
    def apply_attention_dot(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        decoder_segment_ids: Any,
        model_mode: str = "train",
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, None, None]:
        arguments = (query, key, value, decoder_segment_ids, model_mode)
        if model_mode != "train":
            return stock(self, *arguments, *args, **kwargs)
        signature = inspect.signature(stock)
        given = signature.bind(self, *arguments, *args, **kwargs).arguments
        _check(self, given)
        return attend(query, key, value, decoder_segment_ids, block), None, None

    return apply_attention_dot


def _check(layer: Any, given: dict[str, Any]) -> None:
    """Refuses attention that is more than causal within segments."""
    wrong = {
        **{name: given.get(name) is not None for name in _ARGUMENTS},
        **{name: getattr(layer, name) for name in _ATTRIBUTES},
        "attention_type": seams.value(layer.attention_type) != "global",
        "moba": layer.config.moba,
        "use_qk_clip": given.get("record_max_logits", False),
        "ici_context_parallelism": layer.mesh.shape.get("context", 1) > 1,
        "float32_logits=false": not layer.config.float32_logits,
    }
    seams.refuse(wrong, "attention in blocks", "run.patches.attention_blocks=false")


def attend(query: Any, key: Any, value: Any, segments: Any = None, block: int = BLOCK) -> Any:
    """Causal attention of query [B, T, H, h] (scaled already), key and value [B, T, K, h].

    H is a multiple of K. With segments [B, T] positions attend within their own only.
    """
    batch, length, heads, size = query.shape
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    return _attention(groups, key, value, segments, block).reshape(query.shape)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _parts(length: int, block: int) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys up to its last."""
    ends = [min(start + block, length) for start in range(0, length, block)]
    return [(slice((end - 1) // block * block, end), slice(0, end)) for end in ends]


def _logits(query: Any, key: Any, segments: Any, rows: slice, upto: slice) -> Any:
    """[B, K, G, t, s] in fp32, rounded to `dtype` before as MaxText's are; masked."""
    found = jnp.einsum("btkgd,bskd->bkgts", query[:, rows], key[:, upto]).astype(jnp.float32)
    mine = segments[:, rows, None] == segments[:, None, upto]
    earlier = jnp.arange(rows.start, rows.stop)[:, None] >= jnp.arange(upto.stop)
    return jnp.where((mine & earlier)[:, None, None], found, -jnp.inf)


def _run(query: Any, key: Any, value: Any, segments: Any, block: int) -> tuple[Any, Any]:
    """The result, and the logarithm of each softmax's sum [B, K, G, T]."""
    results, sums = [], []
    for rows, upto in _parts(query.shape[1], block):
        found = _logits(query, key, segments, rows, upto)
        largest = found.max(-1, keepdims=True)
        weights = jnp.exp(found - largest)
        total = weights.sum(-1)
        result = _dot("bkgts,bskd->bkgtd", weights.astype(value.dtype), value[:, upto])
        result = (result / total[..., None]).astype(query.dtype)
        results.append(result.transpose(0, 3, 1, 2, 4))
        sums.append(largest[..., 0] + jnp.log(total))
    return jnp.concatenate(results, 1), jnp.concatenate(sums, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query: Any, key: Any, value: Any, segments: Any, block: int) -> Any:
    return _run(query, key, value, segments, block)[0]


def _forward(query: Any, key: Any, value: Any, segments: Any, block: int) -> tuple[Any, Any]:
    result, sums = _run(query, key, value, segments, block)
    # What MaxText's remat policies keep by this name, so that none computes this twice.
    result, sums = checkpoint_name(result, "context"), checkpoint_name(sums, "context")
    return result, (query, key, value, segments, result, sums)


def _backward(block: int, saved: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
    query, key, value, segments, result, sums = saved
    # Else XLA takes the logits for those of the forward pass, and keeps all of them until here.
    query, key = jax.lax.optimization_barrier((query, key))
    dtype = query.dtype
    means = _dot("btkgd,btkgd->bkgt", cotangent, result)
    into_query = []
    into_key, into_value = (jnp.zeros(part.shape, jnp.float32) for part in (key, value))
    for rows, upto in _parts(query.shape[1], block):
        found = _logits(query, key, segments, rows, upto)
        weights = jnp.exp(found - sums[..., rows, None])
        above = cotangent[:, rows]
        into_value = into_value.at[:, upto].add(
            _dot("bkgts,btkgd->bskd", weights.astype(dtype), above)
        )
        inner = jnp.einsum("btkgd,bskd->bkgts", above, value[:, upto]).astype(jnp.float32)
        inner = (weights * (inner - means[..., rows, None])).astype(dtype)
        into_query.append(_dot("bkgts,bskd->btkgd", inner, key[:, upto]).astype(dtype))
        into_key = into_key.at[:, upto].add(_dot("bkgts,btkgd->bskd", inner, query[:, rows]))
    parts_of_query = jnp.concatenate(into_query, 1)
    return parts_of_query, into_key.astype(key.dtype), into_value.astype(value.dtype), None


_attention.defvjp(_forward, _backward)
