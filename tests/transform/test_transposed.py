"""A weight's gradient is made in the order in which it is read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fp8jax import _compat, ops
from fp8jax.recipes import blocked_wgrad, deepseek_v3
from fp8jax.transform import fp8_transform
from fp8jax.transform.analysis._transposed import read_transposed
from fp8jax.transform.ir import jaxprs_of

MATRICES = (((1,), (0,)), ((), ()))


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _found(fn, *shapes):
    avals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jaxpr = jax.make_jaxpr(fn)(*avals).jaxpr
    dots = [i for i, e in enumerate(jaxpr.eqns) if e.primitive.name == "dot_general"]
    return [i in read_transposed(jaxpr, range(len(jaxpr.eqns))) for i in dots]


def test_jax_gradient_of_a_weight_is_found_and_nothing_else_of_a_product():
    def gradients(x, w):
        y, pull = jax.vjp(jnp.dot, x, w)
        return y, pull(y)

    assert sorted(_found(gradients, (4, 3), (3, 5))) == [False, False, True]


def test_result_that_is_also_read_as_it_is_stays():
    def returned(x, w):
        y = jnp.dot(x, w)
        return y, y.T

    def used(x, w):
        y = jnp.dot(x, w)
        return y.T, y + 1

    shapes = (4, 3), (3, 5)
    assert _found(returned, *shapes) == [False]
    assert _found(used, *shapes) == [False]
    assert _found(lambda x, w: jnp.dot(x, w).T, *shapes) == [True]


def test_only_the_order_that_exchanges_the_sides_counts():
    numbers = (((2,), (0,)), ((), ()))  # [a, b, k] by [k, n]

    def reads(*order):
        return lambda x, w: lax.transpose(lax.dot_general(x, w, numbers), order)

    shapes = (4, 6, 3), (3, 5)
    assert _found(reads(2, 0, 1), *shapes) == [True]
    assert _found(reads(2, 1, 0), *shapes) == [False]
    batched = (((2,), (1,)), ((0,), (0,)))

    def batches(x, w):
        return lax.transpose(lax.dot_general(x, w, batched), (0, 2, 1))

    assert _found(batches, (2, 4, 3), (2, 3, 5)) == [False]


def test_exchanged_layout_is_that_of_the_exchanged_product():
    x, w = _normal(0, 2, 3, 4, 5), _normal(1, 2, 4, 6)
    numbers = (((2,), (1,)), ((0,), (0,)))  # [2 | 3, 5 | 6]
    layout = ops.plan(x.shape, w.shape, numbers, "test")
    exchanged = layout.exchanged
    out = lax.dot_general(w, x, exchanged.numbers)
    assert out.shape == exchanged.out_shape == (2, 6, 3, 5)
    wanted = layout.exchange_sides(lax.dot_general(x, w, numbers))
    # Sums of four float32 products of order one, in another order.
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    assert exchanged.exchanged == layout


def _step(dot, x, w, y):
    def loss(w, x):
        return jnp.sum((dot(x, w) - y) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))(w, x)


@pytest.mark.parametrize(
    "recipe", [deepseek_v3(), blocked_wgrad()], ids=("1d1d", "box")
)
@pytest.mark.parametrize("sides", [(210, 128, 160), (100, 300, 200), (384, 160, 130)])
def test_whole_step_has_the_layers_bits_of_dw_where_no_tile_fixes_the_order(
    sides, recipe
):
    m, k, n = sides
    x, w, y = _normal(0, m, k), _normal(1, k, n) * 0.1, _normal(2, m, n)
    layer = functools.partial(
        ops.dot_general, dimension_numbers=MATRICES, recipe=recipe
    )
    wanted = jax.jit(functools.partial(_step, layer))(x, w, y)
    whole = fp8_transform(functools.partial(_step, jnp.dot), recipe, weights=[1])
    assert whole.report(x, w, y).fraction == 1.0
    for ours, theirs in zip(
        jax.tree.leaves(whole(x, w, y)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def _partitioned_shapes(jaxpr):
    """Of products; quantizations have codes and scales."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "custom_partitioning" and len(eqn.outvars) == 1:
            yield eqn.outvars[0].aval.shape
        for sub in jaxprs_of(eqn):
            yield from _partitioned_shapes(_compat.open_jaxpr(sub))


def test_sharded_step_makes_dw_in_the_order_in_which_it_is_read():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=split)
    y = jax.ShapeDtypeStruct((1024, 384), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((256, 384), jnp.float32)
    whole = fp8_transform(functools.partial(_step, jnp.dot), weights=[1])
    found = set(_partitioned_shapes(_compat.open_jaxpr(whole.trace(x, w, y).jaxpr)))
    assert found == {y.shape, x.shape, w.shape}  # and not w.T's
