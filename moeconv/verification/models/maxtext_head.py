"""The one liberty taken with MaxText: its tied head without the rounding to bfloat16."""

import contextlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any, Literal

from moeconv.errors import UnsupportedError

Head = Literal["stock", "unrounded"]


@contextlib.contextmanager
def unrounded_head() -> Iterator[None]:
    """While the forward is traced, take the rounding of the tied table out of the output matmul.

    MaxText's `attend_on_embedding` casts the table to bfloat16 whatever `dtype` is; the decoder
    calls it by the name that it imported, the one place replaced here. A patch that no longer bites
    would make the two heads agree for the wrong reason: so the cast must be where it was, and the
    replacement must be called.
    """
    import jax.numpy as jnp
    from maxtext.layers import embeddings, nnx_decoders

    stock = embeddings.attend_on_embedding
    calls = 0

    def attend(query: Any, table: Any, dtype: Any, config: Any, out_sharding: Any = None) -> Any:
        nonlocal calls
        calls += 1
        return jnp.dot(query, jnp.asarray(table, dtype).T, preferred_element_type=dtype)

    moved = UnsupportedError(
        f"MaxText {importlib.metadata.version('maxtext')} computes its tied output head differently"
        " from 0.2.5: the rounding to bfloat16 cannot be taken out. Install maxtext==0.2.5."
    )
    source = inspect.getsource(stock)
    if (
        source.count("bfloat16") != 1
        or "jnp.asarray(embedding_table, jnp.bfloat16).T" not in source
    ):
        raise moved
    if getattr(nnx_decoders, stock.__name__, None) is not stock:
        raise moved
    nnx_decoders.attend_on_embedding = attend
    try:
        yield
    finally:
        nnx_decoders.attend_on_embedding = stock
    if calls != 1:
        raise moved
