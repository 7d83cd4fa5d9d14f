"""`sink`: dequantizations go to the bodies that read what they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fp8jax
from fp8jax import ops
from fp8jax.transform.call._qtensors import Dequantize
from fp8jax.transform.ir import equations
from tests.transform.passes.small import (
    LENGTH,
    D,
    after,
    normal,
    only,
    outline,
    same_bits,
    traced,
)

TILE = (128, 128)
CALL = Dequantize(TILE, np.dtype(np.float32))
X = normal(0, 64, D)


def codes(seed):
    spec = fp8jax.QuantSpec(tile=TILE, scale="fp32")
    q = fp8jax.quantize(normal(seed, LENGTH, D, D), spec)
    return q.data, q.scale


def stored(fn):
    """A program of `fn(x, w, v)`, both weights stacks that are made of codes."""

    def run(x, data, scale, more, scales):
        return fn(x, CALL(data, scale), CALL(more, scales))

    args = X, *codes(1), *codes(2)
    program = traced(run, *args)
    made = [eqn for eqn in equations(program.jaxpr) if ops.mark_of(eqn) is not None]
    for eqn in made[:2]:
        program.calls.add(eqn, CALL)
    return program, args


def product(x, w):
    return jnp.tanh(x @ w)


def scanned(x, w, v):
    step = lambda x, w: (product(product(x, w[0]), w[1]), None)  # noqa: E731
    return lax.scan(step, x, (w, v))[0]


def branched(x, w, v):
    w, v = w[0], v[0]
    return lax.cond(x[0, 0] > 0, lambda: product(x, w), lambda: product(x, v))


def looped(x, w, v):
    w, v = w[0], v[0]
    more = lambda s: jnp.sum(s[1] @ v) < 1e9 * (2 - s[0])  # noqa: E731
    body = lambda s: (s[0] + 1, product(s[1], w))  # noqa: E731
    return lax.while_loop(more, body, (0, x))[1]


def rematted(x, w, v):
    return jax.checkpoint(lambda x, w, v: product(product(x, w), v))(x, w[0], v[0])


ONE, TWO = ["dequantize"], ["dequantize"] * 2


@pytest.mark.parametrize(
    ("fn", "inside"),
    [
        (scanned, ("scan", TWO)),
        (branched, ("cond", ONE, ONE)),
        (looped, ("while", ONE, ONE)),
        (rematted, ("remat2", TWO)),
    ],
)
def test_each_body_makes_the_arrays_that_it_reads(fn, inside):
    before, args = stored(fn)
    program = after(before, "sink", "clean")
    assert outline(program.jaxpr) == [inside]
    same_bits(before, program, *args)


def test_slices_of_codes_cross_as_slices():
    before, _ = stored(scanned)
    scan = only(after(before, "sink", "clean").jaxpr, "scan")
    assert [x.kind for x in scan.inputs] == ["carry", *["slice"] * 4]
    inner = [x.inner[0] for x in scan.inputs]
    assert len(set(inner)) == len(inner), "of equal types, and not the same"


def test_array_that_is_carried_stays_one():
    def carried(x, w, v):
        return lax.fori_loop(0, 2, lambda i, w: w + v, w)[0] + x[0]

    before, args = stored(carried)
    program = after(before, "sink", "clean")
    assert outline(program.jaxpr)[0] == "dequantize"
    same_bits(before, program, *args)


def test_without_stored_weights_nothing_changes():
    before = traced(lambda x: lax.map(jnp.sin, x), X)
    assert after(before, "sink").jaxpr is before.jaxpr
