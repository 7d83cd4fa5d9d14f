"""`replace`: products become calls; all else stays."""

import jax.numpy as jnp
from jax import lax

from fp8jax.transform.ir import equations
from tests.transform.passes.small import (
    D,
    N,
    along_rows,
    dots,
    normal,
    outline,
    replaced,
    traced,
)

X, W = normal(0, 64, D), normal(1, D, N)


def test_products_of_one_value_share_its_codes():
    def two(x, w, v):
        return x @ w, x @ v, along_rows(w, w)

    program = replaced(two, X, W, W, roles=["fprop", "fprop", "wgrad"])
    calls = ["quantize", "quantize", "fprop", "quantize", "fprop"]
    # `w` as both operands of a wgrad is one matrix, quantized along its columns once.
    assert outline(program.jaxpr) == [*calls, "quantize", "wgrad"]


def test_equations_keep_their_results_and_places():
    def named(x, w):
        return jnp.sin(x @ w)

    before = traced(named, X, W)
    program = replaced(named, X, W)
    (index,) = dots(before.jaxpr)[0]
    old, new = equations(before.jaxpr), equations(program.jaxpr)
    assert new[-1].invars == new[-2].outvars
    assert [v.aval for v in new[-2].outvars] == [v.aval for v in old[index].outvars]
    assert {e.source_info for e in new[:-1]} == {old[index].source_info}


def test_shared_bodies_stay_shared_where_the_plan_agrees():
    def body(x, w):
        return x + x @ w @ w.T

    def run(x, w):
        step = lambda x, w: (body(x, w), None)  # noqa: E731
        return lax.scan(step, x, w)[0] + lax.scan(step, 2 * x, w)[0]

    ws = jnp.stack([W, W])
    program = replaced(run, X, ws)
    scans = [e for e in equations(program.jaxpr) if e.primitive.name == "scan"]
    one, other = (e.params["jaxpr"] for e in scans)
    old = [e for e in equations(traced(run, X, ws).jaxpr) if e.primitive.name == "scan"]
    shared = old[0].params["jaxpr"] is old[1].params["jaxpr"]
    assert (one is other) == shared


def test_measured_products_come_with_what_is_collected():
    program = replaced(lambda x, w: x @ w, X, W, measures=True)
    made = ["quantize", "quantize", "moments", "moments", "statistics", "fprop"]
    assert outline(program.jaxpr) == made
