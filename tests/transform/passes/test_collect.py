"""`collect`: what is measured comes out of each construct."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.transform.passes.small import LENGTH, D, after, normal, replaced, run

X, W = normal(0, 64, D), normal(1, D, D)
# Of moments `[*iterations, operand, 6]` the first counts elements, as the last is amax.
OPERANDS, MOMENTS = 2, 6


def layer(x, w):
    return jnp.tanh(x @ w)


def collected(fn, *args):
    before = replaced(fn, *args, measures=True)
    program = after(before, "collect")
    results = run(program, *args)
    wanted = run(before, *args)
    own = len(wanted)
    for a, b in zip(results[:own], wanted, strict=True):
        assert jnp.array_equal(a, b)
    return [None if i is None else results[own + i] for i in program.collected]


def moments(x):
    """By NumPy what is told of an operand without its codes: the largest magnitude."""
    return np.abs(np.asarray(x)).max()


def test_plain():
    (found,) = collected(layer, X, W)
    assert found.shape == (OPERANDS, MOMENTS)
    np.testing.assert_array_equal(found[:, -1], [moments(X), moments(W)])


@pytest.mark.parametrize("around", [jax.checkpoint, jax.jit])
def test_calls(around):
    (found,) = collected(around(layer), X, W)
    np.testing.assert_array_equal(found[:, -1], [moments(X), moments(W)])


def test_scans_stack_them():
    stack = jnp.stack([W, 2 * W, 3 * W])
    (found,) = collected(lambda x, ws: lax.map(lambda w: layer(x, w), ws), X, stack)
    assert found.shape == (LENGTH, OPERANDS, MOMENTS)
    np.testing.assert_array_equal(found[:, 1, -1], [moments(w) for w in stack])


def test_loops_of_unknown_length_add_them_up():
    def looped(x, w):
        def body(state):
            i, _ = state
            return i + 1, layer(x, w) * (1 + i.astype(jnp.float32))

        limit = jnp.int32(LENGTH) + jnp.int32(0 * x[0, 0])
        return lax.while_loop(lambda s: s[0] < limit, body, (jnp.int32(0), x))[1]

    (once,), (found,) = collected(layer, X, W), collected(looped, X, W)
    # Three equal float32 numbers added: two roundings.
    np.testing.assert_allclose(found[:, :-1], LENGTH * once[:, :-1], rtol=1e-6)
    np.testing.assert_array_equal(found[:, -1], once[:, -1])


def test_what_decides_whether_a_loop_goes_on_keeps_its_own():
    def looped(x, w):
        more = lambda s: jnp.sum(jnp.abs(s[1] @ w)) > 1e9  # noqa: E731
        return lax.while_loop(more, lambda s: (s[0], layer(s[1], w)), (0, x))[1]

    inside, condition = collected(looped, X, W)
    assert not inside.any(), "the loop never ran"
    assert condition is None


def test_branches_not_taken_count_nothing():
    def branched(x, w):
        return lax.cond(x[0, 0] > 1e9, lambda: layer(x, w), lambda: layer(x, w.T))

    one, other = collected(branched, X, W)
    found = [bool(x.any()) for x in (one, other)]
    assert sorted(found) == [False, True]


def test_devices_add_theirs_up():
    mesh = jax.make_mesh((2,), ("a",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"in_specs": (P("a"), P()), "out_specs": P("a")}
    mapped = jax.shard_map(layer, mesh=mesh, **specs)
    (found,), (whole,) = collected(mapped, X, W), collected(layer, X, W)
    # Rows of x are parted, and each device has the whole of w.
    # NumPy's tolerance, 1e-7: an ulp, of two sums in place of one.
    np.testing.assert_allclose(found[0, 0], whole[0, 0])
    np.testing.assert_allclose(found[1, 0], 2 * whole[1, 0])
    np.testing.assert_array_equal(found[:, -1], whole[:, -1])


def test_nothing_is_collected_unless_it_is_measured():
    before = replaced(layer, X, W)
    assert after(before, "collect") is before
