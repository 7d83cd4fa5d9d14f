"""Dead code goes out of bodies, too; live code, effects and our own calls stay."""

import collections

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fp8jax import _compat, ops
from fp8jax.transform.ir import jaxprs_of, without_dead_code

X, Y = jnp.arange(6.0).reshape(3, 2), jnp.array([2.0, 3.0])


@pytest.fixture(autouse=True)
def _no_leaks():
    with jax.checking_leaks():
        yield


def primitives(jaxpr):
    """How often each stands in a program, in bodies too."""
    found = collections.Counter()
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        found[eqn.primitive.name] += 1
        for sub in jaxprs_of(eqn):
            found += primitives(sub)
    return found


def traced(function):
    with _compat.remat_as_jaxpr():
        return jax.make_jaxpr(function)(X, Y)


def check(function, dead, live):
    """The same numbers without these primitives; `live` ones stay, as often as here."""
    jaxpr = traced(function)
    made = without_dead_code(jaxpr)
    before, after = primitives(jaxpr), primitives(made)
    assert all(before[name] for name in (*dead, *live)), before
    assert not any(after[name] for name in dead), after
    assert all(before[name] == after[name] for name in live), after
    wanted = core.jaxpr_as_fun(jaxpr)(X, Y)
    chex.assert_trees_all_equal(jax.jit(core.jaxpr_as_fun(made))(X, Y), wanted)
    assert without_dead_code(made) is made, "nothing is left to do"
    return made


def only(jaxpr, name):
    (eqn,) = [e for e in _compat.open_jaxpr(jaxpr).eqns if e.primitive.name == name]
    return eqn


def test_equations_that_nothing_reads():
    def run(x, y):
        lax.exp(lax.tan(x))
        return lax.sin(y)

    check(run, ["exp", "tan"], ["sin"])


def test_scan_loses_carries_slices_constants_and_stacks_that_nothing_reads():
    def run(x, y):
        def body(carry, a):
            live, counted, dead = carry
            return (live + lax.sin(a), counted + 1, lax.tan(dead) * y), lax.exp(a)

        init = jnp.zeros(2), jnp.int32(0), jnp.ones(2)
        (live, _, _), _ = lax.scan(body, init, x)
        return live

    made = check(run, ["tan", "exp"], ["sin"])
    scan = only(made, "scan")
    assert (len(scan.invars), len(scan.outvars)) == (2, 1)


def test_carry_that_another_one_needs_stays():
    def run(x, y):
        def body(carry, a):
            first, second, third = carry
            return (first + second, lax.sin(third), lax.cos(third)), None

        return lax.scan(body, (y, y, y), x)[0][0]

    made = check(run, [], ["sin", "cos"])
    assert len(only(made, "scan").outvars) == 3


def test_while_loses_what_neither_its_condition_nor_a_reader_needs():
    def run(x, y):
        def body(state):
            i, total, dead = state
            return i + 1, total + y, lax.exp(dead) * jnp.sum(x)

        limit = jnp.int32(jnp.sum(y))
        state = jnp.int32(0), y, y
        return lax.while_loop(lambda s: s[0] < limit, body, state)[1]

    made = check(run, ["exp"], ["lt"])
    loop = only(made, "while")
    # The limit, `y`, and the count and total that are carried.
    assert (len(loop.invars), len(loop.outvars)) == (4, 2)


def test_branches_lose_the_same_results():
    def run(x, y):
        def one(y):
            return lax.sin(y), lax.exp(y)

        def other(y):
            return y, jnp.sum(lax.tan(x)) * y

        return lax.cond(y[0] > 0, one, other, y)[0]

    made = check(run, ["exp", "tan"], ["sin"])
    assert len(only(made, "cond").outvars) == 1


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint])
def test_calls(around):
    @around
    def call(x, y):
        return lax.sin(y), lax.exp(x)

    name = {jax.jit: "jit", jax.checkpoint: "remat2"}[around]
    made = check(lambda x, y: call(x, y)[0], ["exp"], ["sin"])
    eqn = only(made, name)
    assert (len(eqn.invars), len(eqn.outvars)) == (1, 1)


def test_shard_map():
    mesh = jax.make_mesh((1,), ("a",), (AxisType.Auto,))
    specs = {"in_specs": (P("a"), P()), "out_specs": (P(), P("a"))}

    def local(x, y):
        return lax.sin(y), lax.exp(x)

    call = jax.shard_map(local, mesh=mesh, **specs)
    made = check(lambda x, y: call(x, y)[0], ["exp"], ["sin"])
    assert len(only(made, "shard_map").invars) == 1


def test_effects_stay_and_what_they_read():
    seen = []

    def run(x, y):
        def body(carry, a):
            jax.debug.callback(seen.append, lax.sin(a), ordered=False)
            return carry + 1, lax.exp(a)

        return lax.scan(body, jnp.int32(0), x)[0] * y.astype(jnp.int32)

    jaxpr = traced(run)
    made = without_dead_code(jaxpr)
    assert primitives(made)["sin"] == 1
    assert primitives(made)["exp"] == 0
    core.jaxpr_as_fun(made)(X, Y)
    jax.effects_barrier()
    assert len(seen) == 3


def test_mutable_arrays_keep_their_places():
    def run(x, y):
        ref = jax.new_ref(y)

        def body(i, unread):
            ref[...] = ref[...] + x[i]
            return lax.exp(unread)

        lax.fori_loop(0, 3, body, y)
        return ref[...]

    jaxpr = traced(run)
    made = without_dead_code(jaxpr)
    # A few float32 additions in two orders: some ulps.
    chex.assert_trees_all_close(
        jax.jit(core.jaxpr_as_fun(made))(X, Y)[0], Y + jnp.sum(X, 0), rtol=1e-6
    )


def test_our_calls_stay_the_objects_that_they_are():
    both = ops.marked("both", lambda x: (lax.sin(x), lax.exp(x)))

    def run(x, y):
        return lax.scan(lambda c, a: (c + both(a)[0], None), y, x)[0]

    jaxpr = traced(run)

    def body_of_ours(jaxpr):
        scan = only(jaxpr, "scan")
        eqns = _compat.open_jaxpr(jaxprs_of(scan)[0]).eqns
        (ours,) = [e for e in eqns if ops.mark_of(e) == "both"]
        return ours.params["jaxpr"]

    made = without_dead_code(jaxpr)
    assert body_of_ours(made) is body_of_ours(jaxpr)


def test_what_is_shared_stays_shared():
    shared = jax.jit(lambda x, y: (lax.sin(y), lax.exp(x)))

    def run(x, y):
        return shared(x, y)[0], shared(2 * x, y)[0], shared(x, 2 * y)

    made = check(run, [], ["sin"])
    one, other, whole = (
        jaxprs_of(e)[0] for e in made.eqns if e.primitive.name == "jit"
    )
    assert one is other
    assert whole is not one
    assert primitives(made)["exp"] == 1
