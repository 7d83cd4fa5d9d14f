"""`carry`: the forward scan stacks codes where the backward scan makes them."""

import jax.numpy as jnp
from jax import lax

from tests.transform.passes.small import (
    LENGTH,
    D,
    after,
    along_rows,
    normal,
    outline,
    replaced,
    same_bits,
)

X, STACK = normal(0, D, D), normal(1, LENGTH, D, D)


def step(x, stack):
    """A forward scan that keeps each layer's input, and a backward one with wgrad."""

    def forward(x, w):
        return jnp.tanh(x @ w), x

    def backward(dy, kept):
        x, w = kept
        return dy @ w.T, along_rows(x, dy)

    y, xs = lax.scan(forward, x, stack)
    return lax.scan(backward, y, (xs, stack), reverse=True)[1]


ROLES = ["fprop", "dgrad", "wgrad"]


def test_codes_for_wgrad_are_made_in_the_forward_scan():
    before = replaced(step, X, STACK, roles=ROLES, early=True)
    program = after(before, "carry", "clean")
    forward, backward = outline(program.jaxpr)
    assert forward == ("scan", ["quantize", "quantize", "fprop", "quantize"])
    assert backward[1].count("quantize") == 3, "of dy two ways, and of w"
    same_bits(before, program, X, STACK)
    # Together with those for fprop, in one call.
    paired = after(program, "pair")
    assert "quantize_both" in outline(paired.jaxpr)[0][1]
    same_bits(before, paired, X, STACK)


def test_without_the_recipe_nothing_changes():
    before = replaced(step, X, STACK, roles=ROLES)
    assert after(before, "carry").jaxpr is before.jaxpr


def test_stack_that_no_scan_made_stays():
    def run(dy, xs):
        return lax.scan(lambda dy, x: (dy, x.T @ dy), dy, xs)[1]

    before = replaced(run, X, STACK, roles=["wgrad"], early=True)
    assert after(before, "carry").jaxpr is before.jaxpr
