"""The tied output head in FP16: the model's largest matmul, and its two in the backward pass.

MaxText's `attend_on_embedding` (layers/embeddings.py) rounds the table to bfloat16 whatever
`dtype` is, leaves the accumulation to the compiler, and with `logits_dot_in_fp32` computes all
three matmuls from fp32 operands. Here all three multiply fp16 by fp16 and add up in fp32, which a
T4's tensor cores do. The table is rounded to fp16 once, for the lookup and the head, so that its
gradient crosses between devices once and in fp16, as every other weight's does, under the loss
scale: a sum that overflows is infinite, and the step is skipped.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from moeconv_train import seams


@contextlib.contextmanager
def install() -> Iterator[None]:
    """While this is open, MaxText traces a tied head of `dtype: float16` this way, others as ever.

    The logits have the type that MaxText gives them: fp16, or fp32 with `logits_dot_in_fp32`.
    """
    from maxtext.layers import nnx_decoders
    from maxtext.layers.embeddings import Embed
    from maxtext.trainers.pre_train import train

    with (
        seams.replaced(nnx_decoders, attend_on_embedding=_head(nnx_decoders.attend_on_embedding)),
        seams.replaced(Embed, __call__=_lookup(Embed.__call__)),
        seams.replaced(train, loss_fn=_with_one_table(train.loss_fn)),
    ):
        yield


def _head(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`attend_on_embedding`, another one for fp16 only."""

    @functools.wraps(stock)
    def attend_on_embedding(
        query: Any, embedding_table: Any, attend_dtype: Any, config: Any, out_sharding: Any = None
    ) -> Any:
        if np.dtype(config.dtype) != np.float16:
            return stock(query, embedding_table, attend_dtype, config, out_sharding)
        wrong = {
            "shard_mode": seams.value(config.shard_mode) != "auto",
            "parameter_memory_host_offload": config.parameter_memory_host_offload,
        }
        seams.refuse(wrong, "the FP16 head", "run.patches.fp16_head=false")
        return attend(query, embedding_table, attend_dtype)

    return attend_on_embedding


def _with_one_table(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`loss_fn` of a model whose table is rounded where it enters, not where it is used."""

    @functools.wraps(stock)  # nnx.value_and_grad reads the signature
    def loss_fn(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if np.dtype(config.dtype) != np.float16 or not config.logits_via_embedding:
            return stock(model, config, *args, **kwargs)
        with _replaced(model.token_embedder.embedding, lambda table: table.astype(np.float16)):
            return stock(model, config, *args, **kwargs)

    return loss_fn


def _lookup(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`Embed.__call__`, whose gradient XLA does not add to the head's before it is summed.

    It would scatter the lookup's rows into the head's gradient, already summed between devices, and
    then sum all of it again. Behind this mark, which asks for nothing, it adds both and sums once.
    """

    @functools.wraps(stock)
    def lookup(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.embedding.get_value().dtype != np.float16:
            return stock(self, *args, **kwargs)
        any_sharding = PartitionSpec(PartitionSpec.UNCONSTRAINED, PartitionSpec.UNCONSTRAINED)
        mark = functools.partial(jax.lax.with_sharding_constraint, shardings=any_sharding)
        with _replaced(self.embedding, mark):
            return stock(self, *args, **kwargs)

    return lookup


@contextlib.contextmanager
def _replaced(variable: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """Another value of a model's variable, and the old one at the end."""
    value = variable.get_value()
    variable.set_value(change(value))
    try:
        yield
    finally:
        variable.set_value(value)


def attend(y: Any, table: Any, dtype: Any) -> Any:
    """The product of y [..., D] and tableᵀ [D, V] in `dtype`, fp16 by fp16; gradients likewise.

    Gradients are added up in fp32 and rounded to fp16.
    """
    return _matmul(y.astype(np.float16), table.astype(np.float16), np.dtype(dtype))


def dot(left: Any, right: Any, dimensions: Any, dtype: Any) -> Any:
    """`lax.dot_general` of fp16 operands with sums in fp32, rounded to `dtype` at the end.

    jax lets the type of sums be named for GPUs only. There the result is written in `dtype` at
    once: half of the memory (3.9 GiB instead of 6.1 for the reference model's logits) and, as XLA
    sums between devices right behind a matmul, half of what crosses.
    """
    matmul = functools.partial(jax.lax.dot_general, dimension_numbers=dimensions)

    def named(left: Any, right: Any) -> Any:
        sums = jax.lax.DotAlgorithmPreset.F16_F16_F32
        return matmul(left, right, precision=sums, preferred_element_type=dtype)

    def widened(left: Any, right: Any) -> Any:
        return matmul(left, right, preferred_element_type=jnp.float32).astype(dtype)

    return jax.lax.platform_dependent(left, right, cuda=named, default=widened)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(y: Any, table: Any, dtype: Any) -> Any:
    return dot(y, table, (((y.ndim - 1,), (1,)), ((), ())), dtype)


def _forward(y: Any, table: Any, dtype: Any) -> tuple[Any, Any]:
    return _matmul(y, table, dtype), (y, table)


def _backward(dtype: Any, saved: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
    y, table = saved
    cotangent, batch = cotangent.astype(jnp.float16), tuple(range(y.ndim - 1))
    dy = dot(cotangent, table, (((y.ndim - 1,), (0,)), ((), ())), y.dtype)
    return dy, dot(cotangent, y, ((batch, batch), ((), ())), table.dtype)


_matmul.defvjp(_forward, _backward)
