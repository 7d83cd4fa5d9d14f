"""Under `jax.disable_jit` a rewritten program runs operation by operation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.transform import fp8_transform

D = 128
W = np.random.default_rng(0).normal(size=(2, D, D)).astype(np.float32) * 0.1
X = np.random.default_rng(1).normal(size=(64, D)).astype(np.float32)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def loss(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])
    return jnp.mean(jnp.square(x))


def step(params, x):
    value, grads = jax.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda p, g: p - g, params, grads), value


@pytest.mark.parametrize("options", [{}, {"stats": True}], ids=["step", "stats"])
def test_a_step_is_in_fp8_with_the_same_numbers(options):
    fn = fp8_transform(jax.jit(step), **options)
    want = fn({"w": W}, X)
    with jax.disable_jit():
        got = fp8_transform(jax.jit(step), **options)({"w": W}, X)
        report = fn.report({"w": W}, X)
    assert report.fraction == 1.0
    # XLA fuses less: roundings in float32, of which a code may move by a step of 2^-3
    # among thousands.
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_forward_function_is_differentiated():
    grads = jax.grad(fp8_transform(loss))
    want = grads({"w": W}, X)
    with jax.disable_jit():
        got = grads({"w": W}, X)
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5)
