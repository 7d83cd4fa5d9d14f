"""`dedupe`: the same codes cross into a body once."""

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

X, W = normal(0, 64, D), normal(1, D, D)


def test_codes_that_left_two_bodies_cross_the_outer_one_once():
    """Two inner calls read one weight: what each quantized meets in the outer one."""

    @jax.checkpoint
    def inner(x, w):
        return jnp.tanh(x @ w)

    def run(x, w):
        step = lambda x, _: (inner(inner(x, w), w), None)  # noqa: E731
        return lax.scan(step, x, None, LENGTH)[0]

    before = replaced(run, X, W, weights=[1])
    hoisted = after(before, "hoist")
    assert outline(hoisted.jaxpr)[:-1] == ["quantize"] * 2
    merged = after(hoisted, "pair")
    assert outline(merged.jaxpr)[:-1] == ["quantize"]
    program = after(merged, "dedupe")

    def constants(program):
        scan = only(program.jaxpr, "scan")
        codes = [x for x in scan.inputs if x.operand.aval.dtype.itemsize == 1]
        return [x.kind for x in codes]

    assert constants(merged) == ["constant", "constant"]
    assert constants(program) == ["constant"]
    same_bits(before, program, X, W)


@pytest.mark.parametrize("fn", [lambda x, w: x @ w, lambda x, w: jnp.sin(x) + w[0]])
def test_else_nothing_changes(fn):
    before = replaced(fn, X, W)
    assert after(before, "dedupe").jaxpr is before.jaxpr


def test_other_operands_may_come_twice():
    def run(x, w):
        step = lambda c, a: (c + a[0] * a[1], None)  # noqa: E731
        return lax.scan(step, x[0], (x, x))[0] + w[0]

    before = replaced(run, X, W)
    assert after(before, "dedupe").jaxpr is before.jaxpr
