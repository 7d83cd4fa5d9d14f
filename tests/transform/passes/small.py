"""Small programs for the tests of single passes, and how they are looked at."""

import dataclasses
import functools

import chex
import jax
from jax import lax
from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.quant import QuantSpec
from fp8jax.transform._pipeline import PASSES
from fp8jax.transform.ir import Construct, equations, jaxprs_of
from fp8jax.transform.lower._program import Program
from fp8jax.transform.plan._decisions import QuantizedDot

D, N, LENGTH = 128, 256, 3
SPECS = {
    "fprop": (QuantSpec(tile=(1, 128)), QuantSpec(tile=(128, 128))),
    "dgrad": (QuantSpec(tile=(1, 128)), QuantSpec(tile=(128, 128))),
    "wgrad": (QuantSpec(tile=(1, 128)), QuantSpec(tile=(1, 128))),
}


def leaks_checked(fn):
    """`fn`, under JAX's check for tracers that leak.

    Only where passes trace: under it JAX keeps no trace and compiles all anew.
    """

    @functools.wraps(fn)
    def run(*args, **options):
        with jax.checking_leaks():
            return fn(*args, **options)

    return run


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def dots(jaxpr, position=()):
    """The positions of a program's products, in order."""
    found = []
    for i, eqn in enumerate(equations(jaxpr)):
        if eqn.primitive.name == "dot_general":
            found.append((*position, i))
        for j, body in enumerate(jaxprs_of(eqn)):
            found += dots(body, (*position, i, j))
    return found


@leaks_checked
def traced(fn, *args, weights=(), measures=False, is_rule=False):
    """The program of a function, `weights` being the numbers of its arguments."""
    with _compat.remat_as_jaxpr():
        jaxpr = jax.make_jaxpr(fn)(*args)
    is_weight = tuple(i in weights for i, _ in enumerate(args))
    return Program(jaxpr, is_weight, measures=measures, is_rule=is_rule)


def along_rows(x, y):
    """`x.T @ y` as JAX's gradient of a weight has it: one product, nothing moved."""
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def product(role, early=False):
    """What a product becomes; of wgrad the first operand is the layer's input."""
    return QuantizedDot(role, *SPECS[role], "xla", "lhs", early=early)


@leaks_checked
def replaced(fn, *args, roles=None, early=False, **options):
    """The program with its products replaced: all are fprop, or what `roles` says."""
    program = traced(fn, *args, **options)
    positions = dots(program.jaxpr)
    roles = roles or ["fprop"] * len(positions)
    plan = {
        p: product(role, early and role == "wgrad")
        for p, role in zip(positions, roles, strict=True)
    }
    program = dataclasses.replace(program, replacements=plan)
    return PASSES["replace"](program)


@leaks_checked
def after(program, *names):
    """The program after these passes; each changes no type of input or result."""
    for name in names:
        program = PASSES[name](program)
    return program


def outline(jaxpr):
    """Our calls, constructs with their bodies, and nothing else, in order."""
    found = []
    for eqn in equations(jaxpr):
        mark = ops.mark_of(eqn)
        construct = Construct.of(eqn)
        if mark is not None:
            found.append(mark)
        elif construct is not None:
            bodies = [outline(body) for body in construct.bodies]
            if any(bodies):
                found.append((eqn.primitive.name, *bodies))
    return found


def only(jaxpr, name):
    """The one construct of that primitive."""
    (eqn,) = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == name]
    return Construct.of(eqn)


def run(program, *args):
    return jax.jit(core.jaxpr_as_fun(program.jaxpr))(*args)


def same_bits(before, program, *args):
    chex.assert_trees_all_equal(run(program, *args), run(before, *args))
