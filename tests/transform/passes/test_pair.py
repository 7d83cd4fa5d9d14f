"""`pair`: equal codes are made once, two ways of one matrix in one call."""

import jax
import jax.numpy as jnp

from tests.transform.passes.small import (
    D,
    after,
    along_rows,
    normal,
    outline,
    replaced,
    same_bits,
)

X, W = normal(0, D, D), normal(1, D, D)


def test_two_ways_in_one_pass_are_one_call():
    def run(x, w):
        return x @ w, along_rows(x, w)

    before = replaced(run, X, W, roles=["fprop", "wgrad"])
    assert outline(before.jaxpr).count("quantize") == 4
    program = after(before, "pair")
    assert outline(program.jaxpr).count("quantize_both") == 1
    same_bits(before, program, X, W)


def test_equal_codes_behind_equal_views_are_made_once():
    def run(x, w, v):
        return x.reshape(2, 64, D) @ w, x.reshape(2, 64, D) @ v

    before = replaced(run, X, W, W)
    assert outline(before.jaxpr).count("quantize") == 3, "`replace` has seen to it"


def test_what_differs_in_more_than_its_tiles_stays_apart():
    def run(x, w):
        return x @ w, jnp.sin(x) @ w

    before = replaced(run, X, W)
    assert after(before, "pair").jaxpr is before.jaxpr


def test_within_a_body():
    @jax.checkpoint
    def run(x, w):
        return x @ w, along_rows(x, w)

    before = replaced(run, X, W, roles=["fprop", "wgrad"])
    program = after(before, "pair")
    assert outline(program.jaxpr)[0][1].count("quantize_both") == 1
    same_bits(before, program, X, W)
