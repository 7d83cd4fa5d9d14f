"""`hoist`: what a loop does not change is quantized before it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.transform.passes.small import (
    LENGTH,
    D,
    after,
    normal,
    only,
    outline,
    replaced,
    same_bits,
)

X, W, STACK = normal(0, 64, D), normal(1, D, D), normal(2, LENGTH, D, D)
LAYER = ["quantize", "quantize", "fprop"]


def layers(x, stack):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_slices_of_stacked_weights_are_quantized_as_a_stack():
    before = replaced(layers, X, STACK, weights=[1])
    assert outline(before.jaxpr) == [("scan", LAYER)]
    program = after(before, "hoist")
    assert outline(program.jaxpr) == ["quantize", ("scan", ["quantize", "fprop"])]
    same_bits(before, program, X, STACK)
    # The stack itself is not read any more.
    scan = only(after(program, "clean").jaxpr, "scan")
    assert [x.operand.aval.dtype.itemsize for x in scan.inputs] == [4, 1, 4]


def test_slices_of_activations_stay():
    before = replaced(layers, X, STACK)
    assert after(before, "hoist").jaxpr is before.jaxpr


def test_constants_leave_scans_and_whiles_be_they_weights_or_not():
    def scanned(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, LENGTH)[0]

    def looped(x, w):
        limit = jnp.sum(jnp.abs(w)).astype(jnp.int32)
        more = lambda s: s[0] < jnp.minimum(limit, LENGTH)  # noqa: E731
        return lax.while_loop(more, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]

    for fn, name in ((scanned, "scan"), (looped, "while")):
        before = replaced(fn, X, W)
        program = after(before, "hoist")
        bodies = [["quantize", "fprop"], *[[]] * (name == "while")]
        assert outline(program.jaxpr) == ["quantize", (name, *bodies)]
        same_bits(before, program, X, W)


def test_views_go_with_them():
    def scanned(x, w):
        step = lambda x, _: (jnp.tanh(x @ w.T.reshape(D, D)), None)  # noqa: E731
        return lax.scan(step, x, None, LENGTH)[0]

    before = replaced(scanned, X, W)
    program = after(before, "hoist", "clean")
    assert outline(program.jaxpr) == ["quantize", ("scan", ["quantize", "fprop"])]
    same_bits(before, program, X, W)


@pytest.mark.parametrize(("weights", "leaves"), [([1], True), ([], False)])
def test_weights_alone_leave_remat(weights, leaves):
    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w)

    before = replaced(layer, X, W, weights=weights)
    program = after(before, "hoist")
    inside = ["quantize", "fprop"] if leaves else LAYER
    assert outline(program.jaxpr) == [*["quantize"] * leaves, ("remat2", inside)]
    same_bits(before, program, X, W)


def test_branches_keep_what_may_never_run():
    def branched(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    before = replaced(branched, X, W, weights=[1])
    assert after(before, "hoist").jaxpr is before.jaxpr


def test_through_two_loops_at_once():
    def accumulated(xs, stack):
        return lax.map(lambda x: layers(x, stack), xs)

    xs = jnp.stack([X, 2 * X])
    before = replaced(accumulated, xs, STACK, weights=[1])
    program = after(before, "hoist")
    inner = ("scan", ["quantize", "fprop"])
    assert outline(program.jaxpr) == ["quantize", ("scan", [inner])]
    same_bits(before, program, xs, STACK)


def test_stack_that_a_scan_cast_is_cast_as_a_whole():
    def cast(x, stack):
        def forward(x, w):
            w = w.astype(jnp.bfloat16)
            return jnp.tanh(x @ w), w

        def backward(dy, w):
            return dy @ w.T, None

        y, ws = lax.scan(forward, x, stack)
        return lax.scan(backward, y, ws, reverse=True)[0]

    args = X.astype(jnp.bfloat16), STACK
    before = replaced(cast, *args, weights=[1], roles=["fprop", "dgrad"])
    program = after(before, "hoist", "clean")
    inside = [("scan", ["quantize", name]) for name in ("fprop", "dgrad")]
    assert outline(program.jaxpr) == ["quantize", inside[0], "quantize", inside[1]]
    same_bits(before, program, *args)
