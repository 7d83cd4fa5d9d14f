"""The transformed function is called, jitted, vmapped and refused as the plain one."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import recipes
from fp8jax.transform import fp8_transform

D = 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {"a": normal(0, D, D), "b": normal(1, D, D)}
X = normal(9, 2, 64, D)


def mlp(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])


def copy(tree):
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def test_traces_once_for_one_signature():
    traces = []

    def forward(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    fn = fp8_transform(forward)
    first = fn(PARAMS, X)
    chex.assert_trees_all_equal(fn(PARAMS, X), first)
    assert len(traces) == 1
    fn(PARAMS, X[:1])
    assert len(traces) == 2


def test_static_and_donated_arguments_of_a_jitted_step_stay_such():
    traces = []

    def step(params, x, power, *, activation, scale=1.0):
        traces.append(power)
        act = getattr(jnp, activation)
        grad = jax.grad(lambda p: jnp.mean(act(x @ p["a"]) ** power) * scale)(params)
        return jax.tree.map(lambda p, g: p - g, params, grad)

    jitted = jax.jit(
        step, donate_argnums=0, static_argnums=2, static_argnames="activation"
    )
    fn = fp8_transform(jitted)
    params = {"a": normal(0, D, D)}
    assert fn.report(params, X, 2, activation="tanh").fraction == 1.0
    out = fn(copy(params), X, 2, activation="tanh")
    traced = len(traces)
    mine = copy(params)
    chex.assert_trees_all_equal(fn(mine, X, 2, activation="tanh"), out)
    assert len(traces) == traced
    assert mine["a"].is_deleted()
    assert not X.is_deleted()
    other = fn(copy(params), X, power=3, activation="tanh", scale=2.0)
    assert len(traces) > traced
    assert not np.array_equal(other["a"], out["a"])


def test_options_of_its_own_are_those_of_jit():
    def forward(name, params, x):
        return getattr(jnp, name)(x @ params["a"])

    fn = fp8_transform(forward, static_argnums=0, donate_argnames="x", weights="params")
    x = jnp.copy(X)
    fn("tanh", PARAMS, x)
    assert x.is_deleted()


def test_leaves_that_are_no_arrays_are_static():
    def forward(config, params, x, mask=None):
        assert mask is None
        return config["activation"](x @ params["a"]) * config["scale"]

    fn = fp8_transform(forward, weights="params")
    config = {"activation": jnp.tanh, "name": "tanh", "scale": 2.0}
    out = fn(config, PARAMS, X)
    assert fn.report(config, PARAMS, X).fraction == 1.0
    halved = fn({**config, "scale": 1.0}, PARAMS, X, None)
    chex.assert_trees_all_close(out, 2 * halved)
    sine = fn({**config, "activation": jnp.sin}, PARAMS, X)
    assert not np.array_equal(sine, out)


def test_static_results_are_those_that_came_in_and_survive_the_cache():
    def forward(config, params, x):
        return config, x @ params["a"]

    fn = fp8_transform(forward, weights="params")
    for activation in (jnp.tanh, jnp.sin, jnp.tanh):
        config = {"activation": activation, "scale": 2.0}
        (got, _) = fn(config, PARAMS, X)
        assert got["activation"] is activation
        assert float(got["scale"]) == 2.0


def test_result_that_is_no_array_and_did_not_come_in_is_jax_s_error():
    fn = fp8_transform(lambda params, x: (x @ params["a"], object()))
    with pytest.raises(TypeError, match="not a valid JAX type"):
        fn(PARAMS, X)


def test_equinox_filter_jit_keeps_static_numbers_and_donation():
    eqx = pytest.importorskip("equinox")

    def step(model, x):
        assert model["inference"] is True
        assert model["rate"] == 0.5
        return {**model, "w": x @ model["w"]}

    model = {"w": PARAMS["a"], "inference": True, "rate": 0.5}
    out = fp8_transform(eqx.filter_jit(step))(model, X)
    assert (out["inference"], out["rate"]) == (True, 0.5)
    assert isinstance(out["rate"], float)
    mine, x = copy(model), jnp.copy(X)
    fp8_transform(eqx.filter_jit(step, donate="all-except-first"))(mine, x)
    assert x.is_deleted()
    assert not mine["w"].is_deleted()


def dropout_model(eqx):
    """A module with a Python number, a flag and a function among its leaves."""

    class Model(eqx.Module):
        a: eqx.nn.Linear
        dropout: eqx.nn.Dropout
        b: eqx.nn.Linear
        activation: Callable

        def __call__(self, x, key):
            return self.b(self.dropout(self.activation(self.a(x)), key=key))

    linear = functools.partial(eqx.nn.Linear, 128, 128, use_bias=False)
    a, b = linear(key=jax.random.key(0)), linear(key=jax.random.key(1))
    return Model(a, eqx.nn.Dropout(0.5), b, jax.nn.gelu)


def dropout_loss(model, x, key):
    return jnp.mean(jax.vmap(model, in_axes=(0, None))(x, key) ** 2)


def dropout_step(eqx):
    def step(model, x, key):
        loss, grads = eqx.filter_value_and_grad(dropout_loss)(model, x, key)
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        return eqx.apply_updates(model, updates), loss

    return step


@pytest.mark.parametrize("way", ["unjitted", "inside filter_jit"])
def test_numbers_in_equinox_modules_are_static_without_a_filter_jit_within(way):
    eqx = pytest.importorskip("equinox")
    model, key, x = dropout_model(eqx), jax.random.key(2), X[0]
    fp8_step = fp8_transform(dropout_step(eqx))
    assert fp8_step.report(model, x, key).fraction == 1.0
    called = fp8_step if way == "unjitted" else eqx.filter_jit(fp8_step)
    expected = fp8_transform(eqx.filter_jit(dropout_step(eqx)))
    mine = theirs = model
    for _ in range(2):  # What comes out goes in again.
        mine, loss = called(mine, x, key)
        theirs, theirs_loss = expected(theirs, x, key)
        assert loss == theirs_loss
        assert type(mine.dropout.p) is float
        assert mine.dropout.inference is False
        assert mine.activation is model.activation
    chex.assert_trees_all_equal(mine.a.weight, theirs.a.weight)


def test_equinox_s_own_functions_see_python_numbers_as_such():
    eqx = pytest.importorskip("equinox")
    model, key, x = dropout_model(eqx), jax.random.key(2), X[0]
    _, grads = fp8_transform(eqx.filter_value_and_grad(dropout_loss))(model, x, key)
    assert grads.dropout.p is None
    step = dropout_step(eqx)
    axes = (None, eqx.if_array(0), None)
    on_each = eqx.filter_pmap(step, in_axes=axes, axis_name="devices")
    fn = fp8_transform(on_each)
    assert fn.report(model, x[None], key).fraction == 1.0
    _, loss = fn(model, x[None], key)
    _, expected = fp8_transform(eqx.filter_jit(step))(model, x, key)
    # One device's mean, by another program in float32: some ulps.
    chex.assert_trees_all_close(loss[0], expected, rtol=1e-6)


def test_number_of_a_plain_argument_is_an_array_as_under_jit():
    traces = []

    def forward(params, x, scale):
        traces.append(scale)
        return x @ params["a"] * scale

    fn = fp8_transform(forward)
    out = fn(PARAMS, X, 1.0)
    chex.assert_trees_all_equal(fn(PARAMS, X, 2.0), 2 * out)
    assert len(traces) == 1


def test_shapes_alone_will_do_for_a_report():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), PARAMS)
    fn = fp8_transform(mlp)
    assert fn.report(shapes, X) == fn.report(PARAMS, X)


def test_name_and_docstring_are_the_function_s():
    def step(params, x):
        """Says what it does."""
        return mlp(params, x)

    fn = fp8_transform(step)
    assert (fn.__name__, fn.__doc__) == ("step", "Says what it does.")
    assert "step" in fn.lower(PARAMS, X).as_text()[:200]


def test_vmap_of_a_transformed_function_works():
    fn = fp8_transform(mlp)
    mapped = jax.vmap(fn, in_axes=(None, 0))(PARAMS, X)
    chex.assert_trees_all_equal(mapped, jnp.stack([fn(PARAMS, x) for x in X]))


def test_forward_mode_outside_says_to_apply_the_transform_outside():
    fn = fp8_transform(mlp)
    with pytest.raises(TypeError, match=r"fp8_transform\(lambda \.\.\.: jax\.jvp"):
        jax.jvp(lambda x: fn(PARAMS, x), (X,), (X,))

    def tangents(params, x):
        return jax.jvp(lambda x: mlp(params, x), (x,), (x,))

    outside = fp8_transform(tangents)
    assert outside.report(PARAMS, X).fraction == 1.0
    chex.assert_tree_all_finite(outside(PARAMS, X))


def test_differentiating_a_whole_step_says_what_to_do():
    step = fp8_transform(jax.value_and_grad(lambda p, x: jnp.sum(mlp(p, x))))
    with pytest.raises(TypeError, match="Apply fp8_transform outside"):
        jax.grad(lambda x: step(PARAMS, x)[0])(X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fn": 3}, "takes a function, got 3"),
        (
            {"fn": mlp, "recipe": "deepseek"},
            "got recipe='deepseek'; presets are recipes.deepseek_v3(), ",
        ),
        ({"fn": mlp, "rules": ["a.*"]}, "takes rules="),
        ({"fn": mlp, "rules": recipes.bf16()}, "takes rules="),
        ({"fn": mlp, "weights": 1.5}, "takes weights="),
        ({"fn": mlp, "static_argnums": "x"}, "static_argnums"),
    ],
)
def test_wrong_options_are_refused_when_wrapping(arguments, message):
    with pytest.raises(ValueError, match="fp8_transform") as caught:
        fp8_transform(**arguments)
    assert message in str(caught.value)


def test_function_that_cannot_be_traced_is_an_error_that_says_what_to_do():
    def untraceable(params, x, scale):
        return mlp(params, x) if scale > 1 else x

    for run in (fp8_transform(untraceable), fp8_transform(untraceable).report):
        with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
            run(PARAMS, X, 2.0)
        notes = "\n".join(caught.value.__notes__)
        assert "fp8_transform(untraceable)" in notes
        assert "static_argnums=" in notes
    fn = fp8_transform(untraceable, static_argnums=2)
    assert fn.report(PARAMS, X, 2.0).fraction == 1.0


def test_weights_that_name_no_argument_are_refused():
    with pytest.raises(ValueError, match=r"fp8_transform.*weights='q'.*params, x"):
        fp8_transform(mlp, weights="q")(PARAMS, X)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": "("}, "regular expression"),
        ({"pattern": 3}, "regular expression"),
        ({"pattern": "a", "recipe": "bf8"}, "recipe='bf8'; presets are"),
        ({"pattern": "a", "roles": "wgrad"}, "roles from ('fprop', 'dgrad', 'wgrad')"),
        ({"pattern": "a", "roles": ()}, "got ()"),
        ({"pattern": "a", "roles": 3}, "got 3"),
        ({"pattern": "a", "roles": ("fwd",)}, "got ('fwd',)"),
        ({"pattern": "a", "where": 128}, "got 128"),
        ({"pattern": "a", "where": lambda k: k > 1}, "a function of (k, n)"),
    ],
)
def test_rules_that_are_none_are_refused(rule, message):
    with pytest.raises(ValueError, match="Rule takes") as caught:
        recipes.Rule(**rule)
    assert message in str(caught.value)


def test_function_that_closes_over_a_traced_array_works_inside_grad():
    def loss(params):
        forward = fp8_transform(
            lambda x, w: jnp.tanh(x @ w) * params["b"][0], weights=1
        )
        return jnp.mean(jnp.square(forward(X, params["a"])))

    grads = jax.jit(jax.grad(loss))(PARAMS)
    assert float(jnp.linalg.norm(grads["a"])) > 0
    assert float(jnp.linalg.norm(grads["b"])) > 0


def test_transformed_block_works_inside_scan_remat_and_grad():
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), PARAMS)

    def loss(block):
        def of(params, x):
            body = jax.checkpoint(lambda x, p: (block(p, x), None))
            return jnp.mean(jnp.square(jax.lax.scan(body, x, params)[0]))

        return jax.grad(of)

    inside = jax.jit(loss(fp8_transform(mlp)))(stacked, X)
    outside = fp8_transform(loss(mlp))(stacked, X)
    chex.assert_trees_all_equal(inside, outside)


def test_values_read_from_a_mutable_array_are_no_weights():
    def forward(params, x):
        memory = jax.new_ref(params["a"])
        memory[...] = x[0, :1] * jnp.ones((D, 1))
        return jnp.tanh(x @ params["b"]) @ memory[...]

    rows = fp8_transform(forward).report(PARAMS, X).rows
    assert [r.status for r in rows] == ["fp8", "skipped"]


def test_hessian_of_a_forward_is_refused_with_the_way_out():
    fn = fp8_transform(mlp)
    with pytest.raises(
        TypeError, match=r"no forward-mode (and no|or) second derivative"
    ):
        jax.hessian(lambda x: fn(PARAMS, x).sum())(X)
