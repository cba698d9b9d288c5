"""Attention in blocks against the whole square: the same result, the same gradient."""

from types import SimpleNamespace

import fp16_lab
import numpy as np
import pytest
from moeconv_train import causal_attention

from moeconv.errors import ConfigError

pytestmark = [pytest.mark.maxtext, pytest.mark.proof("causal attention")]

B, T, H, K, h = 2, 24, 4, 2, 8


def square(query, key, value, segments):
    """Every query with every key, in the arrays' own type."""
    import jax
    import jax.numpy as jnp

    groups = query.reshape(B, T, K, H // K, h)
    logits = jnp.einsum("btkgd,bskd->bkgts", groups, key)
    mine = segments[:, :, None] == segments[:, None, :]
    mask = mine & (jnp.arange(T)[:, None] >= jnp.arange(T))
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30))
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def arrays(dtype):
    draw = np.random.default_rng(0)
    shapes = ((B, T, H, h), (B, T, K, h), (B, T, K, h), (B, T, H, h))
    segments = np.sort(draw.integers(0, 3, (B, T)), axis=1).astype(np.int32)
    return [draw.standard_normal(shape).astype(dtype) for shape in shapes], segments


@pytest.mark.parametrize("block", [1, 8, 10, 24, 64])
def test_results_and_gradients_are_those_of_the_square(block):
    import jax

    (*inputs, cotangent), segments = arrays(np.float32)
    found, back = jax.vjp(
        jax.jit(lambda *inputs: causal_attention.attend(*inputs, segments, block)), *inputs
    )
    expected, expected_back = jax.vjp(jax.jit(lambda *inputs: square(*inputs, segments)), *inputs)
    for a, b in zip((found, *back(cotangent)), (expected, *expected_back(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_fp16_is_rounded_to_fp16_and_no_further():
    import jax

    (*inputs, cotangent), segments = arrays(np.float16)
    found, back = jax.vjp(lambda *inputs: causal_attention.attend(*inputs, segments, 8), *inputs)
    wide = [part.astype(np.float32) for part in inputs]
    expected, expected_back = jax.vjp(lambda *inputs: square(*inputs, segments), *wide)
    gradients = zip(back(cotangent), expected_back(cotangent.astype(np.float32)), strict=True)
    for a, b in ((found, expected), *gradients):
        assert a.dtype == np.float16
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 2e-3


def test_long_sums_do_not_overflow():
    """65,504 is fp16's end; values of 100 over 2,048 keys add up to three times that."""
    import jax.numpy as jnp

    ones = jnp.ones((1, 2048, 1, 8), jnp.float16)
    result = causal_attention.attend(ones, ones, 100 * ones)
    np.testing.assert_array_equal(result, 100 * ones)


def test_blocks_skip_the_future():
    """Eight blocks: 36 of 64 squares, in every matmul of both passes."""
    import _hlo as hlo
    import jax

    (*inputs, _), _ = arrays(np.float32)

    def flops(block):
        step = jax.jit(
            jax.grad(lambda *x: causal_attention.attend(*x, block=block).sum(), argnums=(0, 1, 2))
        )
        return sum(hlo.count(step.lower(*inputs).compile().as_text()).flops.values())

    # Two matmuls forward, five backward; each result's product with its cotangent is no matmul.
    whole = 7 * 2 * B * H * T * T * h
    assert flops(T) == pytest.approx(whole, rel=0.02)
    assert flops(T // 8) == pytest.approx(whole * 36 / 64, rel=0.05)


def test_no_matmul_of_maxtexts_step_is_wide_but_the_routers(tmp_path):
    """Operands or result [D, experts]; test_cheaper_step.py has the gradient."""
    keys = {**fp16_lab.FP16, "base_num_decoder_layers": 2, "remat_policy": "minimal_with_context"}
    with causal_attention.install(block=16):
        found = wide_matmuls(fp16_lab.Stepper.make(keys, tmp_path).lower().as_text())
    assert found and all("48x4xf32>" in line or "x4xf32>" in line for line in found)


def wide_matmuls(text: str) -> list[str]:
    """Lowered matmuls of fp32 operands."""
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    return [line for line in dots if "xf32>, tensor" in line.split(" : ")[-1]]


def test_it_is_put_back():
    from maxtext.layers.attention_op import AttentionOp

    stock = AttentionOp.apply_attention_dot
    with pytest.raises(KeyError), causal_attention.install():
        assert AttentionOp.apply_attention_dot is not stock
        raise KeyError
    assert AttentionOp.apply_attention_dot is stock


def layer(**other):
    """An attention layer, as far as blocks look at it."""
    keys = {
        "attn_logits_soft_cap": None,
        "float32_qk_product": False,
        "kv_quant": None,
        "is_absorbed_mqa": False,
        "attention_type": SimpleNamespace(value="global"),
        "config": SimpleNamespace(moba=False, float32_logits=True),
        "mesh": SimpleNamespace(shape={"data": 2}),
    }
    return SimpleNamespace(**{**keys, **other})


@pytest.mark.parametrize(
    ("wrong", "given", "message"),
    [
        (layer(float32_qk_product=True), {}, "float32_qk_product does not go"),
        (layer(attn_logits_soft_cap=30.0), {}, "attn_logits_soft_cap does not go"),
        (layer(attention_type=SimpleNamespace(value="local_sliding")), {}, "attention_type does"),
        (layer(mesh=SimpleNamespace(shape={"context": 2})), {}, "ici_context_parallelism does"),
        (layer(), {"bidirectional_mask": 1}, "bidirectional_mask does not go"),
        (layer(), {"record_max_logits": True}, "use_qk_clip does not go"),
        (
            layer(config=SimpleNamespace(moba=False, float32_logits=False)),
            {},
            "^float32_logits=false does not go with attention in blocks; change it, or set run",
        ),
    ],
)
def test_what_is_more_than_causal_is_refused(wrong, given, message):
    from maxtext.layers.attention_op import AttentionOp

    with causal_attention.install():
        blocks = AttentionOp.apply_attention_dot
    with pytest.raises(ConfigError, match=message):
        blocks(wrong, *[None] * 4, **given, qk_product_einsum=None, wv_product_einsum=None)
