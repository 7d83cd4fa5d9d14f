"""`@fp8_transform` on a method is a method, and with options a decorator."""

import functools
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fp8jax import recipes
from fp8jax.transform import Fp8Function, fp8_transform

D = 128
W = jax.random.normal(jax.random.key(0), (D, D)) * 0.1
X = jax.random.normal(jax.random.key(1), (64, D))


def loss(params, x):
    return jnp.mean(jnp.square(x @ params["w"]))


def expected(params, x):
    return fp8_transform(jax.grad(loss))(params, x)


class Trainer:
    """Static, as under `jax.jit`: no pytree."""

    def __init__(self, rate):
        self.rate = rate
        self.traces = 0

    @fp8_transform
    def step(self, params, x):
        """Docstring."""
        self.traces += 1
        grads = jax.grad(loss)(params, x)
        return jax.tree.map(lambda g: self.rate * g, grads)

    @fp8_transform(stats=True, donate_argnums=1)
    def measured(self, params, x):
        return jax.grad(loss)(params, x)

    @fp8_transform(recipe=recipes.bf16())
    def plain(self, params, x):
        return jax.grad(loss)(params, x)

    @staticmethod
    @fp8_transform
    def alone(params, x):
        return jax.grad(loss)(params, x)


def test_method_binds_its_instance():
    one, two = Trainer(1.0), Trainer(2.0)
    params = {"w": W}
    chex.assert_trees_all_equal(one.step(params, X), expected(params, X))
    chex.assert_trees_all_equal(Trainer.step(one, params, X), one.step(params, X))
    doubled = jax.tree.map(lambda g: 2 * g, expected(params, X))
    chex.assert_trees_all_equal(two.step(params, X), doubled)
    assert (one.traces, two.traces) == (1, 1), "each instance is traced once"
    assert one.step.report(params, X).fraction == 1.0
    assert one.step.report(params=params, x=X).fraction == 1.0
    chex.assert_trees_all_equal(Trainer.alone(params, X), expected(params, X))


def test_bound_method_is_lowered_compiled_and_transformed_once_more():
    trainer, params = Trainer(1.0), {"w": W}
    compiled = trainer.step.lower(params, X).compile()
    chex.assert_trees_all_equal(compiled(params, X), expected(params, X))
    again = fp8_transform(trainer.step)
    chex.assert_trees_all_equal(again(params, X), expected(params, X))


def test_bound_method_looks_like_one():
    trainer = Trainer(1.0)
    assert isinstance(Trainer.step, Fp8Function)
    assert Trainer.step.__doc__ == trainer.step.__doc__ == "Docstring."
    assert list(inspect.signature(trainer.step).parameters) == ["params", "x"]
    assert list(inspect.signature(Trainer.step).parameters) == ["self", "params", "x"]


def test_options_hold_on_a_method():
    trainer, params = Trainer(1.0), {"w": jnp.copy(W)}
    grads, stats = trainer.measured(params, X)
    assert set(stats["w"]) == {"fprop", "wgrad"}
    assert params["w"].is_deleted()
    chex.assert_trees_all_equal(grads, expected({"w": W}, X))
    assert trainer.plain.report({"w": W}, X).fraction == 0.0


def test_options_alone_give_a_decorator():
    @fp8_transform(stats=True)
    def step(params, x):
        return jax.grad(loss)(params, x)

    _, stats = step({"w": W}, X)
    assert set(stats["w"]) == {"fprop", "wgrad"}
    with pytest.raises(ValueError, match="takes min_dim >= 0, got -1"):
        fp8_transform(min_dim=-1)(loss)
    with pytest.raises(ValueError, match="takes a function, got None"):
        fp8_transform(None)


def test_method_of_an_nnx_module_updates_it():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(W)

        @fp8_transform
        def step(self, x):
            grads = jax.grad(loss)({"w": self.w[...]}, x)
            self.w[...] = self.w[...] - grads["w"]

    model = Model()
    model.step(X)
    chex.assert_trees_all_equal(model.w[...], W - expected({"w": W}, X)["w"])


def test_method_of_a_pytree_takes_its_arrays_as_arguments():
    class Model(eqx.Module):
        w: jax.Array

        @fp8_transform
        def __call__(self, x):
            return x @ self.w

        @fp8_transform
        def apply(self, x):
            return x @ self.w

    model = Model(W)
    wanted = fp8_transform(lambda w, x: x @ w["w"])({"w": W}, X)
    assert model.apply.report(X).fraction == 1.0
    chex.assert_trees_all_equal(model.apply(X), wanted)
    chex.assert_trees_all_equal(model(X), wanted)


def lineno():
    return inspect.currentframe().f_back.f_lineno


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["plain", "in a jit"])
def test_warnings_are_of_the_line_that_calls(outer):
    fn = fp8_transform(lambda x: jnp.sin(x))
    lines = []

    @outer
    def user(x):
        lines.append(lineno() + 1)
        return fn(x)

    with pytest.warns(UserWarning, match="found no matrix product") as caught:
        user(X)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, lines[0])]


class Static:
    """Transforms above and below the decorators of Python and of JAX."""

    @fp8_transform
    @staticmethod
    def below(params, x):
        return jax.grad(loss)(params, x)

    @fp8_transform(static_argnames="kind")
    @classmethod
    def of_class(cls, params, x, kind="grad"):
        assert cls is Static
        return getattr(jax, kind)(loss)(params, x)

    @classmethod
    @fp8_transform
    @functools.partial(jax.jit, static_argnums=0, static_argnames="kind")
    def jitted(cls, params, x, kind="grad"):
        assert cls is Static
        return getattr(jax, kind)(loss)(params, x)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    @fp8_transform(static_argnames="kind", min_dim=64)
    def within(self, params, x, kind="grad"):
        return getattr(jax, kind)(loss)(params, x)


@pytest.mark.parametrize("name", ["below", "of_class", "jitted"])
@pytest.mark.parametrize("of", [Static, Static()], ids=["class", "instance"])
def test_decorators_of_functions_without_instance(name, of):
    step = getattr(of, name)
    chex.assert_trees_all_equal(step({"w": W}, X), expected({"w": W}, X))
    assert step.report({"w": W}, X).fraction == 1.0


def test_static_arguments_below_and_above_a_jit_with_options():
    for step in (Static.of_class, Static.jitted, Static().within):
        chex.assert_trees_all_equal(step({"w": W}, X, "grad"), expected({"w": W}, X))


@pytest.mark.parametrize("jitted", [False, True])
def test_numbers_given_by_position_are_no_place_for_parameters(jitted):
    def forward(times, scale, params, x):
        for _ in range(times):
            x = x @ params["w"]
        return scale * x

    fn = jax.jit(forward, static_argnums=0) if jitted else forward
    fn = fp8_transform(functools.partial(functools.partial(fn, 2), 0.5))
    assert fn.report({"w": W}, X).fraction == 1.0
    once = fp8_transform(lambda params, x: x @ params["w"])
    params = {"w": W}
    twice = once(params, once(params, X))
    chex.assert_trees_all_close(fn(params, X), 0.5 * twice, rtol=1e-6)
