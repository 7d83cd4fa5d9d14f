"""Each primitive of the table: taken apart, edited, and put together again."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fp8jax import _compat
from fp8jax.transform.ir import Construct

X, Y = jnp.arange(6.0).reshape(3, 2), jnp.array([2.0, 3.0])


@pytest.fixture(autouse=True)
def _no_leaks():
    with jax.checking_leaks():
        yield


def scan(x, y):
    return lax.scan(lambda c, a: (c + a * y, c - a), y, x)


def while_(x, y):
    def body(state):
        i, total = state
        return i + 1, total + jnp.sum(x) * y

    limit = jnp.int32(2) + jnp.sum(y).astype(jnp.int32)
    return lax.while_loop(lambda state: state[0] < limit, body, (jnp.int32(0), y))


def cond(x, y):
    return lax.cond(
        y[0] < 0, lambda x, y: (x * y, y), lambda x, y: (x - y, 2 * y), x, y
    )


def two(x, y):
    return jnp.sin(x) * y, jnp.cos(y)


def in_shard_map(x, y):
    mesh = jax.make_mesh((1,), ("a",), (AxisType.Auto,))
    specs = {"in_specs": (P("a"), P()), "out_specs": (P("a"), P())}
    return jax.shard_map(two, mesh=mesh, **specs)(x, y)


ruled = jax.custom_vjp(two)
ruled.defvjp(lambda x, y: (two(x, y), None), lambda _, g: g)
tangent = jax.custom_jvp(two)
tangent.defjvps(lambda t, out, x, y: out, lambda t, out, x, y: out)

FUNCTIONS = {
    "scan": scan,
    "while": while_,
    "cond": cond,
    "jit": jax.jit(two),
    "remat2": jax.checkpoint(two),
    "shard_map": in_shard_map,
    "custom_vjp_call": ruled,
    "custom_jvp_call": tangent,
}
CHANGED = [name for name in FUNCTIONS if not name.startswith("custom")]


@functools.cache
def traced(name):
    """The program, and its only equation of that primitive."""
    with _compat.remat_as_jaxpr():
        jaxpr = _compat.open_jaxpr(jax.make_jaxpr(FUNCTIONS[name])(X, Y))
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == name]
    return jaxpr, eqn


def run(jaxpr, old, new, outvars=None):
    """The program with another equation in the place of one, traced by JAX again."""
    eqns = [new if eqn is old else eqn for eqn in jaxpr.eqns]
    made = _compat.with_parts(jaxpr, eqns=eqns, outvars=outvars or jaxpr.outvars)
    closed = made if hasattr(made, "consts") else core.ClosedJaxpr(made, ())
    return jax.jit(core.jaxpr_as_fun(closed))(X, Y)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unedited_is_the_same_object(name):
    _, eqn = traced(name)
    construct = Construct.of(eqn)
    assert construct.equation() is eqn
    assert [x.operand for x in construct.inputs] == list(eqn.invars)
    assert [x.outvar for x in construct.results] == list(eqn.outvars)
    assert construct.is_fixed == name.startswith("custom")
    for i, body in enumerate(construct.bodies):
        inner = _compat.open_jaxpr(body)
        own = [x.inner[i] for x in construct.inputs if x.inner[i] is not None]
        assert own == list(inner.invars)
        if construct.returns(i):
            assert [x.inner[i] for x in construct.results] == list(inner.outvars)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_agree_across_the_border(name):
    _, eqn = traced(name)
    construct = Construct.of(eqn)
    for x in construct.inputs:
        for v in filter(None, x.inner):
            shape = x.operand.aval.shape[1:] if x.kind == "slice" else None
            assert v.aval.shape == (x.operand.aval.shape if shape is None else shape)
    for x in construct.results:
        for v in filter(None, x.inner):
            stacked = x.kind == "stack"
            assert v.aval.shape == x.outvar.aval.shape[stacked:]


def test_kinds():
    def kinds(name):
        return [x.kind for x in Construct.of(traced(name)[1]).inputs]

    assert kinds("scan") == ["constant", "carry", "slice"]
    assert kinds("while")[-2:] == ["carry", "carry"]
    assert set(kinds("while")[:-2]) == {"constant"}
    assert kinds("cond") == ["choice", "constant", "constant"]
    assert kinds("jit") == ["constant", "constant"]
    # Of a `while`, each constant is the body's or the condition's.
    inner = [x.inner for x in Construct.of(traced("while")[1]).inputs]
    assert inner[0][0] is None
    assert all(x[1] is None for x in inner[1:-2])
    assert all(None not in x for x in inner[-2:])


@pytest.mark.parametrize("name", CHANGED)
def test_dropped_results(name):
    """Each that is no carry may go, and the others stay what they are."""
    jaxpr, eqn = traced(name)
    construct = Construct.of(eqn)
    wanted = dict(zip(jaxpr.outvars, run(jaxpr, eqn, eqn), strict=True))
    for gone in construct.results:
        if gone.kind == "carry":
            continue
        results = tuple(x for x in construct.results if x is not gone)
        new = dataclasses.replace(construct, results=results).equation()
        assert len(new.outvars) == len(eqn.outvars) - 1
        left = [v for v in jaxpr.outvars if v is not gone.outvar]
        chex.assert_trees_all_equal(
            run(jaxpr, eqn, new, left), [wanted[v] for v in left]
        )


@pytest.mark.parametrize("name", ["scan", "while", "cond", "remat2"])
def test_added_constant_is_read_and_dropped_again(name):
    """The first body adds one array more, `y`, to its last result."""
    jaxpr, eqn = traced(name)
    construct = Construct.of(eqn)
    assert construct.takes_inputs
    y, last = jaxpr.invars[1], construct.results[-1]
    new, total = core.Var(y.aval), core.Var(last.inner[0].aval)
    add = jax.make_jaxpr(jnp.add)(last.inner[0].aval, y.aval).eqns[0]
    add = add.replace(invars=[last.inner[0], new], outvars=[total])
    eqns = _compat.open_jaxpr(construct.bodies[0]).eqns
    constant = construct.constant(y, new)
    if name == "cond":  # All branches have the same inputs.
        constant = dataclasses.replace(constant, inner=(new, core.Var(y.aval)))
    added = dataclasses.replace(last, inner=(total, *last.inner[1:]))
    made = dataclasses.replace(
        construct.with_body(0, eqns=[*eqns, add]),
        inputs=(*construct.inputs, constant),
        results=(*construct.results[:-1], added),
    ).equation()
    assert len(made.invars) == len(eqn.invars) + 1
    before, after = run(jaxpr, eqn, eqn), run(jaxpr, eqn, made)
    times = 7.0 if name == "while" else 1.0
    index = jaxpr.outvars.index(last.outvar)
    # Additions of float32 in another order: some ulps.
    chex.assert_trees_all_close(after[index], before[index] + times * Y, rtol=1e-6)

    again = Construct.of(made)
    back = dataclasses.replace(
        again.with_body(0, eqns=eqns),
        inputs=tuple(x for x in again.inputs if x.inner[0] is not new),
        results=construct.results,
    ).equation()
    assert len(back.invars) == len(eqn.invars)
    chex.assert_trees_all_equal(run(jaxpr, eqn, back), before)


def test_scan_takes_a_slice_more_and_stacks_a_result_more():
    jaxpr, eqn = traced("scan")
    construct = Construct.of(eqn)
    x = jaxpr.invars[0]
    new = core.Var(construct.inputs[-1].inner[0].aval)
    result = construct.result(new)
    assert result.kind == "stack"
    assert result.outvar.aval.shape == X.shape
    made = dataclasses.replace(
        construct,
        inputs=(construct.slices(x, new), *construct.inputs),
        results=(result, *construct.results),
    ).equation()
    assert made.invars == [*eqn.invars, x], "sorted by kind, new ones in their order"
    found = run(jaxpr, eqn, made, [*made.outvars])
    chex.assert_trees_all_equal(found[1], X)
    again = Construct.of(made)
    assert [x.kind for x in again.inputs] == ["constant", "carry", "slice", "slice"]
    assert [x.kind for x in again.results] == ["carry", "stack", "stack"]


@pytest.mark.parametrize("name", ["jit", "shard_map", "remat2", "cond"])
def test_results_are_added(name):
    jaxpr, eqn = traced(name)
    construct = Construct.of(eqn)
    inner = [_compat.open_jaxpr(body).invars[-1] for body in construct.bodies]
    result = construct.result(*inner)
    made = dataclasses.replace(
        construct, results=(*construct.results, result)
    ).equation()
    chex.assert_trees_all_equal(run(jaxpr, eqn, made, [result.outvar]), [Y])


@pytest.mark.parametrize("name", ["jit", "shard_map"])
def test_dropped_inputs_take_their_shardings_with_them(name):
    jaxpr, eqn = traced(name)
    construct = Construct.of(eqn)
    x, y = construct.inputs
    body = _compat.open_jaxpr(construct.bodies[0])
    of_y = [e for e in body.eqns if x.inner[0] not in e.invars][-1:]
    made = dataclasses.replace(
        construct.with_body(0, eqns=of_y), inputs=(y,), results=construct.results[1:]
    ).equation()
    chex.assert_trees_all_equal(run(jaxpr, eqn, made, made.outvars), [jnp.cos(Y)])


def test_body_that_is_left_stays_the_same_object():
    shared = jax.jit(two)
    twice = jax.make_jaxpr(lambda x, y: (shared(x, y), shared(x, y)))(X, Y)
    jaxpr = _compat.open_jaxpr(twice)
    one, other = (Construct.of(eqn) for eqn in jaxpr.eqns)
    assert one.bodies[0] is other.bodies[0]
    moved = dataclasses.replace(one.inputs[0], operand=jaxpr.invars[0])
    made = dataclasses.replace(one, inputs=(moved, one.inputs[1])).equation()
    assert Construct.of(made).bodies[0] is other.bodies[0]


def test_what_no_table_knows_is_opaque():
    def solve(y):
        return lax.custom_linear_solve(lambda z: 2 * z, y, lambda _, z: z / 2)

    (eqn,) = jax.make_jaxpr(solve)(Y).eqns
    assert Construct.of(eqn) is None
    assert Construct.of(jax.make_jaxpr(jnp.sin)(X).eqns[0]) is None
