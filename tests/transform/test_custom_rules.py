"""Functions with gradient rules of their own, rewritten with the rule where named."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax import ops
from fp8jax.recipes import Rule, deepseek_v3
from fp8jax.transform import fp8_transform

D = 128
BOUND = 1e-4  # Of the rules that clip: some gradients are beyond, others are not.


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {"a": normal(0, D, 2 * D), "b": normal(1, 2 * D, D)}
X = normal(9, 128, D)


@jax.custom_vjp
def clipped(w, x):
    return x @ w


def clipped_fwd(w, x):
    return x @ w, (w, x)


def clipped_bwd(residuals, dy):
    w, x = residuals
    return jnp.clip(x.T @ dy, -BOUND, BOUND), dy @ w.T


clipped.defvjp(clipped_fwd, clipped_bwd)


@jax.custom_jvp
def scaled(w, x):
    return x @ w


@scaled.defjvp
def scaled_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 3 * (x @ dw) + dx @ w


def model(hidden, params, x):
    """Two layers, the first by `hidden`."""
    return jnp.tanh(hidden(params["a"], x)) @ params["b"]


def loss(forward, params, x):
    return jnp.mean(forward(params, x) ** 2)


def whole(forward):
    return jax.value_and_grad(functools.partial(loss, forward), (0, 1))


def rows(report):
    return [(row.path, row.role, row.status) for row in report.rows]


def by_hand(clip, scale):
    """The first layer in FP8, and its rule, as one would write them with `ops`."""
    recipe = deepseek_v3()

    def dot(x, y, gemm, transposed=(False, False)):
        x, y = (a.T if t else a for a, t in zip((x, y), transposed, strict=True))
        return ops.quantized_dot(x, y, (((1,), (0,)), ((), ())), gemm.lhs, gemm.rhs)

    @jax.custom_vjp
    def layer(w, x):
        return dot(x, w, recipe.fprop)

    def fwd(w, x):
        return layer(w, x), (w, x)

    def bwd(residuals, dy):
        w, x = residuals
        dw = dot(x, scale * dy, recipe.wgrad, (True, False))
        return jnp.clip(dw, -clip, clip), dot(dy, w, recipe.dgrad, (False, True))

    layer.defvjp(fwd, bwd)
    return layer


FUNCTIONS = {
    "clipped": (clipped, by_hand(BOUND, 1.0)),
    "scaled": (scaled, by_hand(np.inf, 3.0)),
}
named = pytest.mark.parametrize("name", FUNCTIONS)


@named
def test_named_function_and_its_rule_are_those_written_by_hand(name):
    function, wanted = FUNCTIONS[name]
    forward = functools.partial(model, function)
    fn = fp8_transform(forward, custom_rules=[name])
    outer = fp8_transform(functools.partial(model, wanted))  # The second layer.
    chex.assert_trees_all_equal(fn(PARAMS, X), outer(PARAMS, X))
    found = jax.jit(whole(fn))(PARAMS, X)
    chex.assert_trees_all_equal(found, jax.jit(whole(outer))(PARAMS, X))
    plain = jax.jit(whole(forward))(PARAMS, X)
    for leaf, exact in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
        assert not np.array_equal(leaf, exact)
        # Rounding to E4M3 has an rms of 2.6 %; ten operands behind each make 8 %.
        assert np.linalg.norm(leaf - exact) < 0.1 * np.linalg.norm(exact)


@named
def test_named_function_has_the_gradients_of_the_whole_step(name):
    forward = functools.partial(model, FUNCTIONS[name][0])
    inside = jax.jit(whole(fp8_transform(forward, custom_rules=name)))
    step = fp8_transform(whole(forward), weights=0)
    chex.assert_trees_all_equal(inside(PARAMS, X), step(PARAMS, X))


@named
def test_report_tells_of_the_rule(name):
    forward = functools.partial(model, FUNCTIONS[name][0])
    report = fp8_transform(forward, custom_rules=[name]).report(PARAMS, X)
    found = rows(report)
    assert set(found[:3]) == {("a", r, "fp8") for r in ("fprop", "wgrad", "dgrad")}
    assert found[3:] == [("b", "fprop", "fp8")]
    assert report.unmatched_custom_rules == ()


def test_users_rule_still_clips_its_gradient():
    fn = fp8_transform(functools.partial(model, clipped), custom_rules=["clipped"])
    gradient = np.abs(jax.grad(functools.partial(loss, fn))(PARAMS, X)["a"])
    assert gradient.max() == np.float32(BOUND)
    assert gradient.min() < BOUND


def test_function_that_is_not_named_is_left_with_its_rule():
    def forward(params, x):
        return scaled(params["b"], clipped(params["a"], x))

    fn = fp8_transform(forward, custom_rules=["scale."])
    first, *others = fn.report(PARAMS, X).rows
    assert (first.status, first.role) == ("skipped", "fprop")
    assert "custom_rules" in first.reason
    assert [(r.path, r.status) for r in others] == [("b", "fp8")] * 3
    layer = fp8_transform(lambda p, x: scaled(p["b"], x), custom_rules=["scaled"])
    chex.assert_trees_all_equal(fn(PARAMS, X), layer(PARAMS, clipped(PARAMS["a"], X)))


def test_name_that_matches_nothing_is_a_warning_that_names_it():
    fn = fp8_transform(functools.partial(model, clipped), custom_rules=["clip", "c.*"])
    report = fn.report(PARAMS, X)
    assert report.unmatched_custom_rules == ("clip",)
    assert "'clip'" in str(report)
    assert json.loads(report.to_json())["unmatched_custom_rules"] == ["clip"]
    with pytest.warns(UserWarning, match="'clip' in custom_rules"):
        fn(PARAMS, X)


@pytest.mark.parametrize("given", [clipped, [clipped], 3, ["("]])
def test_names_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="custom_rules"):
        fp8_transform(model, custom_rules=given)


def test_whole_step_takes_names_without_a_warning(recwarn):
    step = whole(functools.partial(model, clipped))
    chex.assert_trees_all_equal(
        fp8_transform(step, custom_rules=["clipped"])(PARAMS, X),
        fp8_transform(step)(PARAMS, X),
    )
    assert not [w for w in recwarn if "custom_rules" in str(w.message)]


def in_scan(function, params, x):
    def body(x, w):
        return jnp.tanh(function(w, x)), None

    return jax.lax.scan(body, x, params)[0]


AROUND = {
    "jit": lambda f: lambda p, x: jax.jit(f)(p["w"][0], x),
    "remat": lambda f: lambda p, x: jax.checkpoint(f)(p["w"][0], x),
    "scan": lambda f: lambda p, x: in_scan(f, p["w"], x),
    "remat in scan": lambda f: lambda p, x: in_scan(jax.checkpoint(f), p["w"], x),
    "cond": lambda f: lambda p, x: jax.lax.cond(x[0, 0] > 0, f, f, p["w"][0], x),
}


@pytest.mark.parametrize("around", AROUND)
@named
def test_constructs_around_a_named_function(around, name):
    function, wanted = FUNCTIONS[name]
    params = {"w": normal(3, 2, D, D)}
    fn = fp8_transform(AROUND[around](function), custom_rules=[name])
    assert fn.report(params, X).fraction == 1.0
    wanted = AROUND[around](wanted)
    # The same steps in another program: some ulps of float32.
    chex.assert_trees_all_close(fn(params, X), jax.jit(wanted)(params, X), rtol=1e-6)
    # XLA may divide by a power of two later: one rounding.
    chex.assert_trees_all_close(
        jax.jit(whole(fn))(params, X), jax.jit(whole(wanted))(params, X), rtol=1e-6
    )


def test_rule_under_vmap_leaves_each_entrys_wgrad():
    def forward(params, x):
        return jax.vmap(clipped, (None, 0))(params["b"].T, x)

    fn = fp8_transform(forward, custom_rules=["clipped"])
    found = [row[1:] for row in rows(fn.report(PARAMS, X[None]))]
    assert found == [("fprop", "fp8"), ("other", "skipped"), ("dgrad", "fp8")]


def sharded_over(kind, forward):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(normal(4, 1024, D), NamedSharding(mesh, P("data")))
    if kind == "automatic":
        return forward, x
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(forward, mesh=mesh, **specs), x


def test_named_function_of_sharded_arrays_is_split():
    forward, x = sharded_over("automatic", functools.partial(model, clipped))
    fn = fp8_transform(forward, custom_rules=["clipped"])
    found = jax.jit(whole(fn))
    compiled = found.lower(PARAMS, x).compile()
    assert "all-gather" not in compiled.as_text()
    wanted = jax.jit(whole(fn))(PARAMS, np.asarray(x))
    # Devices add tokens up in another order.
    chex.assert_trees_all_close(found(PARAMS, x), wanted, rtol=1e-4, atol=1e-7)


def test_named_function_in_a_shard_map_is_left_and_the_report_says_so():
    forward, x = sharded_over("by hand", functools.partial(model, clipped))
    fn = fp8_transform(forward, custom_rules=["clipped"])
    first, second = fn.report(PARAMS, x).rows
    assert (first.status, second.status) == ("skipped", "fp8")
    assert "named in custom_rules but left as it is: in a shard_map" in first.reason


def test_named_function_that_closes_over_arrays_is_left_with_its_rule():
    mask = np.eye(D, dtype=np.float32)

    @jax.custom_vjp
    def masked(w, x):
        return (x @ w) * mask

    def bwd(residuals, dy):
        w, x = residuals
        return x.T @ (dy * mask), (dy * mask) @ w.T

    masked.defvjp(lambda w, x: (masked(w, x), (w, x)), bwd)

    def forward(params, x):
        return masked(params["b"][:D], jnp.tanh(x @ params["a"][:, :D]))

    fn = fp8_transform(forward, custom_rules=["masked"])
    first, second = fn.report(PARAMS, X).rows
    assert (first.status, second.status) == ("fp8", "skipped")
    assert "closes over arrays" in second.reason
    plain = jax.grad(functools.partial(loss, forward))(PARAMS, X)["b"]
    found = jax.grad(functools.partial(loss, fn))(PARAMS, X)["b"]
    # As above: an element's error is that of the largest at most.
    np.testing.assert_allclose(found, plain, atol=0.1 * np.abs(plain).max())


def test_named_function_with_side_effects_is_left_and_the_report_says_so():
    @jax.custom_vjp
    def loud(w, x):
        jax.debug.print("loud")
        return x @ w

    loud.defvjp(clipped_fwd, clipped_bwd)
    fn = fp8_transform(functools.partial(model, loud), custom_rules=["loud"])
    first, second = fn.report(PARAMS, X).rows
    assert (first.status, second.status) == ("skipped", "fp8")
    assert "side effects" in first.reason


def test_rules_choose_gemms_of_a_named_function():
    fn = fp8_transform(
        functools.partial(model, clipped),
        rules=[Rule("a", None, roles=("wgrad",))],
        custom_rules=["clipped"],
    )
    found = {
        role: status for path, role, status in rows(fn.report(PARAMS, X)) if path == "a"
    }
    assert found == {"fprop": "fp8", "wgrad": "skipped", "dgrad": "fp8"}


def test_operands_and_results_that_are_no_floats():
    @jax.custom_vjp
    def counted(n, w, x):
        return x @ w * n, n + 1

    def bwd(residuals, cotangents):
        n, w, x = residuals
        dy = cotangents[0] * n
        return None, x.T @ dy, dy @ w.T

    counted.defvjp(lambda n, w, x: (counted(n, w, x), (n, w, x)), bwd)

    def forward(params, x, n):
        y, m = counted(n, params["a"], x)
        return y * m

    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        fn = fp8_transform(forward, custom_rules=["counted"])
        assert fn.report(PARAMS, X, 2).fraction == 1.0
        found, plain = (
            jax.grad(lambda p, f=f: jnp.mean(f(p, X, 2) ** 2))(PARAMS)["a"]
            for f in (fn, forward)
        )
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "strict")
    assert not np.array_equal(found, plain)
    # As above.
    assert np.linalg.norm(found - plain) < 0.1 * np.linalg.norm(plain)


def test_rule_that_raises_leaves_the_function_and_the_report_says_so():
    @jax.custom_vjp
    def forward_only(w, x):
        return x @ w

    def refuse(w, x):
        raise NotImplementedError("no gradient yet")

    forward_only.defvjp(refuse, refuse)

    def forward(params, x):
        return model(forward_only, params, x)

    fn = fp8_transform(forward, custom_rules=["forward_only"])
    row, _ = fn.report(PARAMS, X).rows
    assert row.status == "skipped"
    assert "NotImplementedError: no gradient yet" in row.reason
    fn(PARAMS, X)
    with pytest.raises(NotImplementedError, match="no gradient yet"):
        jax.grad(functools.partial(loss, fn))(PARAMS, X)


def test_rules_that_ask_what_is_differentiated_are_left():
    @jax.custom_vjp
    def symbolic(w, x):
        return x @ w

    symbolic.defvjp(
        lambda w, x: (x.value @ w.value, (w.value, x.value)),
        lambda r, dy: (r[1].T @ dy, dy @ r[0].T),
        symbolic_zeros=True,
    )
    fn = fp8_transform(functools.partial(model, symbolic), custom_rules=["symbolic"])
    row, _ = fn.report(PARAMS, X).rows
    assert (row.status, "symbolic_zeros" in row.reason) == ("skipped", True)


def with_statistics(fn):
    """The statistics of a forward function, differentiated and not."""

    def differentiated(params, x):
        def total(params):
            y, stats = fn(params, x)
            return y.sum(), stats

        return jax.grad(total, has_aux=True)(params)[1]

    return jax.jit(differentiated)(PARAMS, X), fn(PARAMS, X)[1]


def test_forward_products_of_named_functions_are_measured_like_any_other():
    def plain(w, x):
        return x @ w

    forward = functools.partial(model, clipped)
    named = fp8_transform(forward, custom_rules=["clipped"], stats=True)
    got = with_statistics(named)
    # The rule's first half and the function itself.
    chex.assert_trees_all_equal(*got)
    wanted = with_statistics(fp8_transform(functools.partial(model, plain), stats=True))
    # The same codes; float32 sums that XLA fuses otherwise.
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)
    assert {path: set(roles) for path, roles in got[0].items()} == {
        "a": {"fprop"},
        "b": {"fprop"},
    }


def test_named_functions_in_a_scan_are_measured_by_iteration():
    def forward(params, x):
        def body(x, w):
            return jnp.tanh(clipped(w, x)), None

        return jax.lax.scan(body, x, params["w"])[0]

    w = jnp.stack([PARAMS["a"][:, :D], 2 * PARAMS["a"][:, D:]])
    fn = fp8_transform(forward, custom_rules=["clipped"], stats=True)
    _, stats = fn({"w": w}, X)
    amax = stats["w"]["fprop"]["amax"]
    chex.assert_trees_all_equal(amax[:, 1], jnp.abs(w).max((1, 2)))


def test_measured_products_of_a_function_s_rule_alone_count_where_it_runs():
    @jax.custom_vjp
    def lean(w, x):  # Its rule computes more than the function itself.
        return jnp.sin(x)

    lean.defvjp(
        lambda w, x: (jnp.sin(x) + 0 * (x @ w)[:, :D], (w, x)),
        lambda residuals, dy: (jnp.zeros_like(residuals[0]), dy),
    )

    def forward(params, x):
        return lean(params["a"], x) @ params["b"][:D]

    fn = fp8_transform(forward, custom_rules=["lean"], stats=True)
    differentiated, alone = with_statistics(fn)
    assert np.isfinite(differentiated["a"]["fprop"]["sqnr_db"]).all()
    assert np.isnan(alone["a"]["fprop"]["sqnr_db"]).all()


def test_second_derivative_and_forward_mode_are_refused():
    def squared(params, x):
        return clipped(params["a"], x) ** 2

    fn = fp8_transform(squared, custom_rules=["clipped"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: fn(PARAMS, x), (X,), (X,))
    first = jax.grad(lambda x: fn(PARAMS, x).sum())
    with pytest.raises(TypeError, match="no second derivative"):
        jax.grad(lambda x: first(x).sum())(X)


def test_transforming_twice_is_transforming_once():
    fn = fp8_transform(functools.partial(model, clipped), custom_rules=["clipped"])
    twice = fp8_transform(fn, custom_rules=["clipped"])
    assert [r.reason for r in twice.report(PARAMS, X).rows] == ["by fp8jax itself"] * 4
    chex.assert_trees_all_equal(
        jax.jit(whole(twice))(PARAMS, X), jax.jit(whole(fn))(PARAMS, X)
    )
