"""`inline`: plain jitted functions with products are written out."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax import ops
from fp8jax.transform.ir import equations
from tests.transform.passes.small import D, after, dots, normal, same_bits, traced

X, W = normal(0, 64, D), normal(1, D, D)


def names(program):
    return [eqn.primitive.name for eqn in equations(program.jaxpr)]


def test_nested_jits_with_products_are_gone_and_their_names_stay():
    @jax.jit
    def inner(x, w):
        with jax.named_scope("inside"):
            return x @ w

    @jax.jit
    def outer(x, w):
        with jax.named_scope("outside"):
            return inner(inner(x, w), w)

    before = traced(outer, X, W)
    program = after(before, "inline")
    assert names(program) == ["dot_general", "dot_general"]
    stacks = [str(eqn.source_info.name_stack) for eqn in equations(program.jaxpr)]
    assert all("outside" in stack and "inside" in stack for stack in stacks)
    same_bits(before, program, X, W)


def test_within_bodies_and_shared_ones_stay_shared():
    inner = jax.jit(lambda x, w: x @ w)

    def run(x, w):
        body = lambda x, _: (jnp.tanh(inner(x, w)), None)  # noqa: E731
        return lax.scan(body, x, None, 2)[0]

    before = traced(run, X, W)
    program = after(before, "inline")
    ((*_, number),) = dots(program.jaxpr)
    assert number == 0
    same_bits(before, program, X, W)


@pytest.mark.parametrize(
    "around",
    [
        jax.checkpoint,
        lambda f: lambda x, w: lax.scan(lambda x, _: (f(x, w), None), x, None, 2)[0],
        lambda f: lambda x, w: lax.cond(x[0, 0] > 0, f, lambda x, w: x, x, w),
    ],
    ids=["remat", "scan", "cond"],
)
def test_result_that_a_body_returns_as_it_is(around):
    before = traced(around(jax.jit(lambda x, w: x @ w)), X, W)
    program = after(before, "inline")
    assert len(dots(program.jaxpr)) == 1
    assert "jit" not in str(program.jaxpr)
    same_bits(before, program, X, W)


def test_what_says_more_than_its_equations_stays():
    mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,))
    placed = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P()))
    plain = jax.jit(lambda x: jnp.sin(x))
    ours = ops.marked("ours", lambda x, w: x @ w)
    before = traced(lambda x, w: ours(plain(placed(x, w)), w), X, W)
    assert names(after(before, "inline")) == names(before) == ["jit"] * 3


def test_functions_with_a_gradient_rule_only_where_nothing_is_differentiated():
    ruled = jax.custom_vjp(lambda x, w: x @ w)
    ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    before = traced(ruled, X, W)
    assert after(before, "inline").jaxpr is not None
    assert names(after(before, "inline")) == ["custom_vjp_call"]
    rule = traced(ruled, X, W, is_rule=True)
    assert names(after(rule, "inline")) == ["dot_general"]
    same_bits(before, after(rule, "inline"), X, W)
