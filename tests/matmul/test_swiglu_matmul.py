"""Two products and their SwiGLU in one call, against the three calls they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import matmul, quant
from fp8jax.testing import assert_same_bits

BLOCK = fp8jax.BLOCK_128X128


def operands(m=5, n=160, k=300, tiles=(BLOCK, BLOCK)):
    keys = jax.random.split(jax.random.key(0), 3)
    x = fp8jax.quantize(jax.random.normal(keys[0], (m, k)))
    weights = (
        fp8jax.quantize(jax.random.normal(key, (n, k)) / 8, tile)
        for key, tile in zip(keys[1:], tiles, strict=True)
    )
    return x, *weights


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("spec", "tiles"),
    [
        (fp8jax.TILE_1X128, (BLOCK, BLOCK)),
        (fp8jax.QuantSpec((1, 128), jnp.float8_e5m2, "fp32"), (BLOCK, BLOCK)),
        (BLOCK, (BLOCK, BLOCK)),
        (fp8jax.TILE_1X128, (BLOCK, fp8jax.TILE_1X128)),
    ],
    ids=["row", "e5m2", "block", "weights in different tiles"],
)
def test_is_two_products_and_their_swiglu(spec, tiles, dtype):
    x, gate, up = operands(tiles=tiles)
    how = {"implementation": "xla"}
    h = matmul.swiglu_matmul(x, gate, up, spec, dtype=dtype, **how)
    products = (fp8jax.scaled_matmul(x, w, out_dtype=dtype, **how) for w in (gate, up))
    expected, _ = quant.quantize_swiglu(*products, spec, None, **how)
    assert h.shape == (5, 160)
    assert_same_bits(h, expected)


def test_bad_input_is_named():
    x, gate, up = operands()
    run = functools.partial(matmul.swiglu_matmul, x, gate)
    with pytest.raises(
        ValueError, match=r"of one shape, got \(160, 300\) and \(8, 300"
    ):
        run(fp8jax.quantize(jnp.ones((8, 300)), BLOCK))
    with pytest.raises(ValueError, match=r"contracts the last .* and \(160, 128\)"):
        run(fp8jax.quantize(jnp.ones((160, 128)), BLOCK))
    with pytest.raises(ValueError, match="swiglu_matmul takes QTensors, got up="):
        run(np.ones((160, 300)))
    with pytest.raises(ValueError, match="swiglu_matmul takes out_dtype bfloat16"):
        run(up, dtype=jnp.int8)
