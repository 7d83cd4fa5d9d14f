"""`ops.einsum` is `jnp.einsum`'s equation on `dot_general`'s numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import numerics, ops, recipes
from fp8jax.testing import assert_same_bits


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


EQUATIONS = {
    "btd,dh->hbt": ((2, 3, 130), (130, 20)),  # jnp.einsum puts the weight first
    "...d,dhe->...he": ((2, 3, 130), (130, 4, 5)),
    "bthe,ehd->dbt": ((2, 3, 4, 5), (5, 4, 30)),
    "gtd,gdh->tgh": ((2, 3, 130), (2, 130, 20)),  # a batch dimension
    "tbdd,dh->bh": ((3, 2, 20, 20), (20, 30)),  # first the diagonal, and a sum over t
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_value_and_gradients_are_those_of_the_exact_einsum(equation):
    x, w = (normal(i, *shape) for i, shape in enumerate(EQUATIONS[equation]))
    exact = np.einsum(equation, np.float64(x), np.float64(w))

    @functools.partial(jax.jit, static_argnums=0)
    def run(einsum, x, w):
        y, vjp = jax.vjp(functools.partial(einsum, equation), x, w)
        return y, vjp(normal(2, *y.shape))

    y, gradients = run(ops.einsum, x, w)
    assert (y.shape, y.dtype) == (exact.shape, jnp.float32)
    # Up to 2^-4 of each operand: 2^-3 of a product is 18 dB.
    assert numerics.sqnr_db(y, exact) > 18
    for ours, expected in zip(gradients, run(jnp.einsum, x, w)[1], strict=True):
        assert ours.dtype == expected.dtype
        assert numerics.sqnr_db(ours, expected) > 18


def test_second_operand_is_the_weight_however_the_result_is_ordered():
    x, w = normal(0, 300, 200), normal(1, 200, 160)
    dout = normal(2, 300, 160)
    dims = (((1,), (0,)), ((), ()))
    y, vjp = jax.vjp(lambda x, w: fp8jax.dot_general(x, w, dims), x, w)
    flipped, flipped_vjp = jax.vjp(lambda x, w: ops.einsum("bd,dh->hb", x, w), x, w)
    assert_same_bits(flipped, y.T)
    assert_same_bits(flipped_vjp(dout.T), vjp(dout))


def test_recipe_that_is_off_is_jnp_einsum():
    x, w = normal(0, 30, 20, dtype=jnp.bfloat16), normal(1, 20, 10, dtype=jnp.bfloat16)
    options = {"precision": "highest", "preferred_element_type": jnp.float32}
    ours = ops.einsum("bd,dh->hb", x, w, recipe=recipes.bf16(), **options)
    assert_same_bits(ours, jnp.einsum("bd,dh->hb", x, w, **options))


@pytest.mark.parametrize("equation", ["bd->b", "bd,dh,h->b", "bd,dh->bq", 3])
def test_bad_equation_is_named(equation):
    with pytest.raises(ValueError, match="einsum takes the subscripts of two operands"):
        ops.einsum(equation, normal(0, 3, 4), normal(1, 4, 5))


def test_bad_input_is_named():
    x, w = normal(0, 3, 4), normal(1, 4, 5)
    with pytest.raises(ValueError, match=r"einsum takes a Recipe or None, got recipe"):
        ops.einsum("bd,dh->bh", x, w, recipe="deepseek_v3")
    with pytest.raises(ValueError, match=r"contracts dimensions of equal sizes"):
        ops.einsum("bd,dh->bh", x, w[:3])
    with pytest.raises(ValueError, match=r"got lhs.dtype=int32"):
        ops.einsum("bd,dh->bh", x.astype(jnp.int32), w)
