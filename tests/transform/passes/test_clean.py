"""`clean`: what a pass left unread goes, and our own calls are known after it."""

import jax.numpy as jnp
from jax import lax

from fp8jax.transform.ir import Construct, equations
from fp8jax.transform.lower._calls import Quantize
from tests.transform.passes.small import (
    LENGTH,
    D,
    after,
    along_rows,
    normal,
    replaced,
    same_bits,
)

X, STACK = normal(0, D, D), normal(1, LENGTH, D, D)


def wgrads(x, stack):
    """A backward scan that reads the inputs that the forward scan stacked for it."""
    y, xs = lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, stack)
    return lax.scan(lambda dy, x: (dy, along_rows(x, dy)), y, xs, reverse=True)[1]


def scans(program):
    found = map(Construct.of, equations(program.jaxpr))
    return [scan for scan in found if scan is not None and scan.length == LENGTH]


def stacks(program):
    """Shapes of what the forward scan stacks for the backward one."""
    results = scans(program)[0].results
    return [x.outvar.aval.shape[1:] for x in results if x.kind == "stack"]


def test_activations_are_not_stacked_beside_the_codes_that_are_read_instead():
    roles = ["fprop", "wgrad"]
    before = replaced(wgrads, X, STACK, roles=roles, early=True)
    carried = after(before, "carry")
    assert stacks(carried) == [(D, D), (D, D), (D, 1)], "activations, codes, scales"
    program = after(carried, "clean")
    assert stacks(program) == [(D, D), (D, 1)]
    same_bits(before, program, X, STACK)


def test_calls_are_known_after_it():
    """The jaxpr that a call runs is the object that it was, in a body cut anew."""
    before = replaced(wgrads, X, STACK, roles=["fprop", "wgrad"], early=True)
    program = after(before, "carry", "clean")
    body = equations(scans(program)[0].bodies[0])
    known = [program.calls.of(eqn) for eqn in body]
    assert sum(isinstance(call, Quantize) for call in known) == 3


def test_nothing_unread_leaves_the_program_as_it_is():
    program = after(replaced(wgrads, X, STACK, roles=["fprop", "wgrad"]), "clean")
    assert after(program, "clean").jaxpr is program.jaxpr
