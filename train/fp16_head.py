"""The tied output head in FP16: the model's largest matmul, and its two in the backward pass.

MaxText's `attend_on_embedding` (layers/embeddings.py) rounds the table to bfloat16 whatever
`dtype` is, leaves the accumulation to the compiler, and with `logits_dot_in_fp32` computes all
three matmuls from fp32 operands. Here all three multiply fp16 by fp16 and add up in fp32, which a
T4's tensor cores do, and the table's gradient is never rounded to fp16.
"""

import contextlib
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from moeconv.errors import ConfigError, UnsupportedError

_CAST = "jnp.asarray(embedding_table, jnp.bfloat16).T"
_CALL = "attend_on_embedding(y, embedding_table, attend_dtype, self.config, out_sharding)"


@contextlib.contextmanager
def install() -> Iterator[None]:
    """While this is open, MaxText traces a tied head of `dtype: float16` this way, others as ever.

    The logits have the type that MaxText gives them: fp16, or fp32 with `logits_dot_in_fp32`.
    """
    from maxtext.layers import embeddings, nnx_decoders

    stock = embeddings.attend_on_embedding
    cast, call = map(inspect.getsource, (stock, nnx_decoders.NNXDecoder.apply_output_head))
    if (
        nnx_decoders.attend_on_embedding is not stock
        or cast.count("bfloat16") != 1
        or _CAST not in cast
        or _CALL not in call
    ):
        raise UnsupportedError(
            f"MaxText {importlib.metadata.version('maxtext')} computes its tied output head "
            "differently from 0.2.5, or something else has replaced it: the FP16 head does not "
            "fit. Install maxtext==0.2.5."
        )
    nnx_decoders.attend_on_embedding = _replacement(stock)
    try:
        yield
    finally:
        nnx_decoders.attend_on_embedding = stock


def _replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`attend_on_embedding`, another one for fp16 only."""

    @functools.wraps(stock)
    def attend_on_embedding(
        query: Any, embedding_table: Any, attend_dtype: Any, config: Any, out_sharding: Any = None
    ) -> Any:
        import numpy as np
        from maxtext.common.common_types import ShardMode

        if np.dtype(config.dtype) != np.float16:
            return stock(query, embedding_table, attend_dtype, config, out_sharding)
        if config.shard_mode == ShardMode.EXPLICIT or config.parameter_memory_host_offload:
            raise ConfigError(
                "The FP16 head supports neither shard_mode: explicit nor "
                "parameter_memory_host_offload: true; unset it."
            )
        return attend(query, embedding_table, attend_dtype)

    return attend_on_embedding


def attend(y: Any, table: Any, dtype: Any) -> Any:
    """The product of y [..., D] and tableᵀ [D, V] in `dtype`, fp16 by fp16; gradients likewise.

    The table's gradient has the table's own dtype and is rounded to no other.
    """
    import numpy as np

    return _matmul()(y.astype(np.float16), table, np.dtype(dtype))


@functools.cache
def _matmul() -> Callable[[Any, Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    def dot(left: Any, right: Any, axes: tuple[Any, Any], dtype: Any) -> Any:
        matmul = functools.partial(jax.lax.dot_general, dimension_numbers=(axes, ((), ())))

        def named(left: Any, right: Any) -> Any:
            sums = jax.lax.DotAlgorithmPreset.F16_F16_F32
            return matmul(left, right, precision=sums, preferred_element_type=dtype)

        def widened(left: Any, right: Any) -> Any:
            return matmul(left, right, preferred_element_type=jnp.float32).astype(dtype)

        # jax lets the accumulator be named for GPUs only. There it keeps fp16 logits in fp16 memory
        # (3.9 GiB instead of 6.1 for the reference model's head).
        left, right = left.astype(jnp.float16), right.astype(jnp.float16)
        return jax.lax.platform_dependent(left, right, cuda=named, default=widened)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def matmul(y: Any, table: Any, dtype: Any) -> Any:
        return dot(y, table, ((y.ndim - 1,), (1,)), dtype)

    def forward(y: Any, table: Any, dtype: Any) -> tuple[Any, Any]:
        return matmul(y, table, dtype), (y, table)

    def backward(dtype: Any, saved: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
        y, table = saved
        batch = tuple(range(y.ndim - 1))
        dy = dot(cotangent, table, ((y.ndim - 1,), (0,)), jnp.float32)
        dtable = dot(cotangent, y, (batch, batch), jnp.float32)
        return dy.astype(y.dtype), dtable.astype(table.dtype)

    matmul.defvjp(forward, backward)
    return matmul
