"""`in_order`: equations after those that make what they read."""

import jax
import jax.numpy as jnp

from fp8jax.transform.ir import equations, in_order


def numbers(eqns, old):
    return [old.index(eqn) for eqn in eqns]


def test_moves_up_only_what_others_need():
    def run(x):
        a = jnp.sin(x)
        b = jnp.cos(x)
        c = a + 1
        return b * c

    old = equations(jax.make_jaxpr(run)(1.0))
    assert numbers(in_order(old), old) == [0, 1, 2, 3]
    sin, cos, add, mul = old
    assert numbers(in_order([mul, cos, add, sin]), old) == [1, 0, 2, 3]
    assert numbers(in_order([cos, add, sin, mul]), old) == [1, 0, 2, 3]


def test_side_effects_keep_their_order():
    def run(x):
        jax.debug.print("first {}", x)
        y = jnp.sin(x)
        jax.debug.print("second {}", y)
        return y

    old = equations(jax.make_jaxpr(run)(1.0))
    assert [bool(eqn.effects) for eqn in old] == [True, False, True]
    assert numbers(in_order([old[0], old[2], old[1]]), old) == [0, 1, 2]
    assert numbers(in_order([old[1], old[0], old[2]]), old) == [1, 0, 2]


def test_a_chain_longer_than_pythons_stack():
    def run(x):
        for _ in range(2000):
            x = x + 1
        return x

    old = equations(jax.make_jaxpr(run)(1.0))
    assert in_order(old[::-1]) == old
