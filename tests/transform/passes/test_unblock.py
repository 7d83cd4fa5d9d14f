"""`unblock`: backward scans need no barrier before what they recompute."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fp8jax.transform.ir import equations, is_differentiated, jaxprs_of
from tests.transform.passes.small import (
    LENGTH,
    D,
    after,
    normal,
    replaced,
    same_bits,
    traced,
)

X, W, STACK = normal(0, D, D), normal(1, D, D), normal(2, LENGTH, D, D)


def barriers(jaxpr):
    """Of each remat's backward pass, whether it has one."""
    found = []
    for eqn in equations(jaxpr):
        if is_differentiated(eqn):
            found.append(eqn.params["prevent_cse"])
        for body in jaxprs_of(eqn):
            found += barriers(body)
    return found


@jax.checkpoint
def layer(x, w):
    return jnp.tanh(x @ w), None


def scanned(x, stack):
    return lax.scan(layer, x, stack)[0].sum()


def test_no_barrier_in_a_backward_scan():
    before = replaced(jax.grad(scanned, argnums=1), X, STACK)
    assert all(barriers(before.jaxpr))
    program = after(before, "unblock")
    assert barriers(program.jaxpr) == [False]
    same_bits(before, program, X, STACK)


def test_without_our_calls_nothing_changes():
    before = traced(jax.grad(scanned, argnums=1), X, STACK)
    assert after(before, "unblock").jaxpr is before.jaxpr


def test_barriers_stay_where_the_forward_pass_stands_beside():
    """Listed layers, and a scan over microbatches that holds both passes."""

    def listed(x, stack):
        for w in stack:
            x, _ = layer(x, w)
        return x.sum()

    def microbatches(x, stack):
        add = lambda sum_, x: (sum_ + jax.grad(listed, 1)(x, stack), None)  # noqa: E731
        return lax.scan(add, jnp.zeros_like(stack), jnp.stack([x, x]))[0]

    for step in (jax.grad(listed, 1), microbatches):
        before = replaced(step, X, STACK)
        assert len(barriers(before.jaxpr)) == LENGTH
        assert after(before, "unblock").jaxpr is before.jaxpr


def test_layers_scanned_within_microbatches():
    def microbatches(x, stack):
        add = lambda sum_, x: (sum_ + jax.grad(scanned, 1)(x, stack), None)  # noqa: E731
        return lax.scan(add, jnp.zeros_like(stack), jnp.stack([x, x]))[0]

    before = replaced(microbatches, X, STACK)
    program = after(before, "unblock")
    assert barriers(program.jaxpr) == [False]
    same_bits(before, program, X, STACK)


@pytest.mark.parametrize("policy", ["dots_saveable", "nothing_saveable"])
def test_with_any_policy(policy):
    policy = getattr(jax.checkpoint_policies, policy)
    saved = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=policy)
    step = jax.grad(lambda x, s: lax.scan(saved, x, s)[0].sum(), argnums=1)
    program = after(replaced(step, X, STACK), "unblock")
    assert barriers(program.jaxpr) == [False]
