"""Statistics are those of the codes that the step multiplies, in every construct."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax import _compat, recipes
from fp8jax.testing import quantize_numpy
from fp8jax.transform import fp8_transform, plot_statistics
from fp8jax.transform.ir import jaxprs_of

D, HIDDEN = 128, 256
RECIPE = recipes.deepseek_v3()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {"up": normal(0, D, HIDDEN), "down": normal(1, HIDDEN, D)}
X = normal(9, 2, 128, D)


def mlp(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def loss(params, x):
    return jnp.mean(jnp.square(mlp(params, x)))


STEP = jax.value_and_grad(loss)


def measured(x, spec):
    """Statistics of a matrix, `[free, contraction]`, by the NumPy oracle."""
    x = np.asarray(x, np.float32)
    data, scale = quantize_numpy(x, spec.tile)
    rows, columns = spec.tile
    whole = np.repeat(np.repeat(scale, rows, 0), columns, 1)
    codes = np.asarray(data, np.float64)
    decoded = codes * whole[: x.shape[0], : x.shape[1]]
    noise = np.sum((x - decoded) ** 2)
    return {
        "sqnr_db": 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / noise),
        "underflow": np.mean((x != 0) & (codes == 0)),
        "saturated": 0.0,  # The scale is that of the largest magnitude.
        "amax": np.max(np.abs(x)),
    }


def assert_measured(got, first, second, specs):
    for i, (x, spec) in enumerate(zip((first, second), specs, strict=True)):
        for name, wanted in measured(x, spec).items():
            # Float32 sums: an ulp for each level of a sum by pairs, and of the rest.
            np.testing.assert_allclose(got[name][i], wanted, rtol=1e-5, err_msg=name)


def test_statistics_are_those_of_both_operands_of_every_product():
    outputs, stats = fp8_transform(STEP, stats=True)(PARAMS, X)
    chex.assert_trees_all_equal(outputs, fp8_transform(STEP)(PARAMS, X))
    assert {path: set(roles) for path, roles in stats.items()} == {
        "up": {"fprop", "wgrad"},
        "down": {"fprop", "wgrad", "dgrad"},
    }
    x, w = X.reshape(-1, D), PARAMS["up"]
    specs = RECIPE.fprop.lhs, RECIPE.fprop.rhs
    assert_measured(stats["up"]["fprop"], x, w.T, specs)
    up = fp8_transform(lambda params, x: x @ params["up"])(PARAMS, X)
    h = np.asarray(jnp.tanh(up)).reshape(-1, HIDDEN)
    y = fp8_transform(mlp)(PARAMS, X)
    dout = np.asarray(jax.jit(jax.grad(lambda y: jnp.mean(jnp.square(y))))(y))
    dout = dout.reshape(-1, D)
    specs = RECIPE.dgrad.lhs, RECIPE.dgrad.rhs
    assert_measured(stats["down"]["dgrad"], dout, PARAMS["down"], specs)
    specs = RECIPE.wgrad.lhs, RECIPE.wgrad.rhs
    assert_measured(stats["down"]["wgrad"], h.T, dout.T, specs)


def test_no_callback_computes_them():
    names = set()

    def visit(jaxpr):
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            names.add(eqn.primitive.name)
            for sub in jaxprs_of(eqn):
                visit(sub)

    visit(fp8_transform(STEP, stats=True).trace(PARAMS, X).jaxpr)
    assert not [name for name in names if "callback" in name]


def layers(count):
    return [jax.tree.map(lambda w, i=i: w * (i + 1), PARAMS) for i in range(count)]


def test_scanned_layers_have_an_axis_of_the_scan_s_length():
    def unrolled(params, x):
        for layer in params:
            x = jax.checkpoint(mlp)(layer, x)
        return jnp.mean(jnp.square(x))

    def scanned(params, x):
        body = jax.checkpoint(lambda x, layer: (mlp(layer, x), None))
        return jnp.mean(jnp.square(jax.lax.scan(body, x, params)[0]))

    several = layers(3)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *several)
    transform = lambda f: fp8_transform(jax.grad(f), stats=True)  # noqa: E731
    _, apart = transform(unrolled)(several, X)
    _, together = transform(scanned)(stacked, X)
    assert set(together) == {"up", "down"}
    assert set(together["up"]) == {"fprop", "recompute", "wgrad", "dgrad"}
    for path, role in (("up", "fprop"), ("down", "wgrad"), ("up", "recompute")):
        for name, values in together[path][role].items():
            assert values.shape == (3, 2)
            # The same products: other fusions may round the sums otherwise.
            wanted = [apart[f"{i}/{path}"][role][name] for i in range(3)]
            np.testing.assert_allclose(values, wanted, rtol=1e-4, err_msg=name)


def test_nested_scans_have_an_axis_each_and_a_weight_used_twice_is_summed():
    def forward(params, x):
        def inner(x, _):
            y = x @ params["w"]
            return jnp.tanh(y @ params["w"]), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=2)[0] @ params["v"]

    params = {"w": normal(3, D, D), "v": normal(4, D, D)}
    _, stats = fp8_transform(forward, stats=True)(params, X)
    assert stats["w"]["fprop"]["sqnr_db"].shape == (2, 3, 2)
    assert stats["v"]["fprop"]["sqnr_db"].shape == (2,)
    np.testing.assert_array_equal(
        stats["w"]["fprop"]["amax"][..., 1], np.full((2, 3), np.abs(params["w"]).max())
    )


def test_weight_used_in_and_out_of_a_scan_has_no_axis():
    def forward(params, x):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, length=2)
        return x @ params["w"]

    _, stats = fp8_transform(forward, stats=True)({"w": normal(3, D, D)}, X)
    assert stats["w"]["fprop"]["amax"].shape == (2,)


def test_branch_not_taken_counts_nothing():
    def forward(params, x, flag):
        return jax.lax.cond(
            flag, lambda x: x @ params["a"], lambda x: jnp.sin(x @ params["b"]), x
        )

    params = {name: normal(i, D, D) for i, name in enumerate("ab")}
    fn = fp8_transform(forward, stats=True)
    for flag, taken, other in ((True, "a", "b"), (False, "b", "a")):
        _, stats = fn(params, X, flag)
        assert np.all(np.isfinite(stats[taken]["fprop"]["sqnr_db"]))
        assert np.all(np.isnan(stats[other]["fprop"]["sqnr_db"]))


LOOPED = {"w": normal(0, D, D), "v": normal(1, D, D)}


def looped(params, x, steps):
    """A loop of unknown length around a scan around a product."""

    def more(state):
        i, x = state
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"][None])
        return i + 1, x @ params["v"]

    return jax.lax.while_loop(lambda state: state[0] < steps, more, (0, x))[1]


def test_loops_of_unknown_length_are_measured_all_iterations_together():
    def unrolled(params, x, steps):
        for _ in range(steps):
            x = jnp.tanh(x @ params["w"]) @ params["v"]
        return x

    fn = fp8_transform(looped, stats=True)
    assert "measured" not in str(fn.report(LOOPED, X, 3))
    out, stats = fn(LOOPED, X, 3)
    plain = fp8_transform(unrolled, stats=True, static_argnums=2)
    wanted_out, wanted = plain(LOOPED, X, 3)
    # Programs with a loop and without are fused otherwise: an ulp of an input may move
    # a code by 2^-3, one in 2^8 of them a sum by 2^-7, and statistics by less.
    chex.assert_trees_all_close(out, wanted_out, rtol=2.0**-7, atol=1e-6)
    # One iteration of the scan has an axis; those of the loop are summed.
    chex.assert_shape(stats["w"]["fprop"]["sqnr_db"], (1, 2))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.reshape(2), stats), wanted, rtol=1e-3
    )
    _, none = fn(LOOPED, X, 0)
    assert np.isnan(none["v"]["fprop"]["sqnr_db"]).all()


def test_product_that_decides_whether_a_loop_goes_on_is_said_not_to_be_measured():
    def forward(params, x):
        def goes_on(x):
            return jnp.sum(x @ params["w"]) > 1e9

        return jax.lax.while_loop(goes_on, lambda x: x @ params["v"], x)

    fn = fp8_transform(forward, stats=True)
    assert "loop's condition are not measured" in str(fn.report(LOOPED, X))
    assert set(fn(LOOPED, X)[1]) == {"v"}


def test_loops_in_a_shard_map_sum_over_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P("data"), P())
    step = jax.shard_map(looped, mesh=mesh, in_specs=specs, out_specs=P("data"))
    _, stats = fp8_transform(step, stats=True)(LOOPED, X, 2)
    _, wanted = fp8_transform(looped, stats=True)(LOOPED, X, 2)
    # As above, over two devices.
    chex.assert_trees_all_close(stats, wanted, rtol=1e-3)


def test_underflow_and_overflow_are_seen():
    rows = np.asarray(X.reshape(-1, D)).copy()
    rows[0, 0], rows[1, 0] = 2.0**10, np.inf
    small = np.where(np.arange(D) < 32, 2.0**-30, 0).astype(np.float32)
    rows[2] = small + np.eye(1, D, D - 1, dtype=np.float32)[0]
    _, stats = fp8_transform(lambda p, x: x @ p["up"], stats=True)(PARAMS, rows)
    got = stats["up"]["fprop"]
    zeroed = measured(np.delete(rows, 1, 0), RECIPE.fprop.lhs)["underflow"]
    # Counts, divided in float32.
    np.testing.assert_allclose(
        got["underflow"][0], zeroed * (len(rows) - 1) / len(rows), rtol=1e-5
    )
    assert got["underflow"][0] >= 32 / rows.size
    assert got["saturated"][0] == pytest.approx(1 / len(rows))
    assert np.isinf(got["amax"][0])
    assert got["saturated"][1] == 0


def test_forward_inside_grad_returns_its_own_as_auxiliary_output():
    forward = fp8_transform(mlp, stats=True)

    def with_aux(params, x):
        y, stats = forward(params, x)
        return jnp.mean(jnp.square(y)), stats

    (_, stats), grads = jax.jit(jax.value_and_grad(with_aux, has_aux=True))(PARAMS, X)
    plain = fp8_transform(mlp)
    mean_square = lambda p, x: jnp.mean(jnp.square(plain(p, x)))  # noqa: E731
    wanted = jax.jit(jax.grad(mean_square))(PARAMS, X)
    chex.assert_trees_all_equal(grads, wanted)
    specs = RECIPE.fprop.lhs, RECIPE.fprop.rhs
    assert_measured(stats["up"]["fprop"], X.reshape(-1, D), PARAMS["up"].T, specs)


def test_nnx_modules_still_train_in_place():
    model = nnx.Linear(D, D, use_bias=False, rngs=nnx.Rngs(0))

    def step(model, x):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - g, nnx.state(model), grads))
        return value

    before = np.asarray(model.kernel[...])
    value, stats = fp8_transform(step, stats=True)(model, X)
    assert value.shape == ()
    assert set(stats["kernel"]) == {"fprop", "wgrad"}
    assert not np.array_equal(before, model.kernel[...])


@pytest.mark.parametrize("how", ["automatic", "explicit", "shard_map", "unchecked"])
def test_sharded_steps_have_the_whole_step_s_statistics(how):
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    step = STEP
    if "shard" in how or how == "unchecked":

        def local(params, x):
            value, grads = jax.value_and_grad(loss)(params, x)
            if how == "unchecked":
                value, grads = jax.lax.pmean((value, grads), "data")
            return jax.lax.pmean(value, "data") if how == "shard_map" else value, grads

        specs = (P(), P("data"))
        check = how == "shard_map"
        step = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=check
        )
    args = (
        jax.device_put(PARAMS, NamedSharding(mesh, P())),
        jax.device_put(X, NamedSharding(mesh, P("data"))),
    )
    _, wanted = fp8_transform(STEP, stats=True)(PARAMS, X)
    with jax.set_mesh(mesh):
        _, stats = fp8_transform(step, stats=True)(*args)
    for name in ("sqnr_db", "underflow", "saturated", "amax"):
        got = stats["up"]["fprop"][name]
        # Float32 sums over devices, in another order.
        np.testing.assert_allclose(got, wanted["up"]["fprop"][name], rtol=1e-5)


def test_plot_draws_every_product_and_refuses_unknown_names():
    pytest.importorskip("matplotlib").use("agg")
    _, stats = fp8_transform(STEP, stats=True)(PARAMS, X)
    ax = plot_statistics(stats, "underflow")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(labels) == sorted(f"{p} {r}" for p in stats for r in stats[p])
    assert ax.get_xlabel() == "underflow"
    with pytest.raises(ValueError, match=r"plot_statistics takes name in .*sqnr_db"):
        plot_statistics(stats, "loss")
