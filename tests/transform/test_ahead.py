"""Steps compiled ahead of time are called with the step's own arguments."""

import functools
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from fp8jax.transform import fp8_transform

D = 128
ADAM = optax.adam(1e-2)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def arguments():
    return {"w": normal(0, D, D)}, normal(1, D, D)


def step(params, x):
    value, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"]) ** 2))(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), value


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.mark.parametrize("through_trace", [False, True])
def test_step_compiled_for_shapes_takes_its_own_arguments(through_trace):
    fn = fp8_transform(jax.jit(step, donate_argnums=0))
    args = shapes(arguments())
    lowered = fn.trace(*args).lower() if through_trace else fn.lower(*args)
    compiled = lowered.compile()
    assert isinstance(compiled, jax.stages.Compiled)
    plain = jax.jit(step, donate_argnums=0).lower(*args)
    assert str(lowered.args_info) == str(plain.args_info)
    wanted = fn(*arguments())
    params, x = arguments()
    chex.assert_trees_all_equal(compiled(params, x), wanted)
    assert params["w"].is_deleted()
    with pytest.raises(TypeError, match="input pytree"):
        compiled(*params.values(), x)


def test_compiled_step_is_called_without_static_arguments():
    def scaled(params, times, x, *, name):
        return step(params, getattr(jnp, name)(x) * times)

    jitted = jax.jit(scaled, static_argnums=1, static_argnames="name")
    params, x = arguments()
    fn = fp8_transform(jitted)
    compiled = fn.lower(params, 2, x, name="tanh").compile()
    wanted = fn(params, 2, x, name="tanh")
    chex.assert_trees_all_equal(compiled(params, x), wanted)


def test_leaves_that_are_no_arrays_must_be_those_that_were_compiled_for():
    def forward(layer, x):
        return layer["activation"](x @ layer["w"]), layer

    params, x = arguments()
    layer = {**params, "activation": jnp.tanh, "name": "up"}
    fn = fp8_transform(forward)
    compiled = fn.lower(layer, shapes(x)).compile()
    assert compiled.cost_analysis()
    found, same = compiled(layer, x)
    chex.assert_trees_all_equal(found, fn(layer, x)[0])
    assert same["activation"] is jnp.tanh
    for other in ({**layer, "activation": jnp.sin}, params):
        with pytest.raises(TypeError, match=r"^fp8_transform\(forward\) was compiled"):
            compiled(other, x)


def test_compiled_partial_takes_what_the_partial_takes():
    jitted = jax.jit(
        lambda scale, params, times, x: step(params, x * scale * times),
        static_argnames="times",
    )
    fn = fp8_transform(functools.partial(jitted, 2.0))
    params, x = arguments()
    compiled = fn.lower(params, 3, x).compile()
    chex.assert_trees_all_equal(compiled(params, x), fn(params, 3, x))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(jnp.tanh(self.up(x))))


@nnx.jit(donate_argnums=(0, 1))
def nnx_step(model, optimizer, x):
    value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(model)
    optimizer.update(model, grads)
    return value


def nnx_arguments():
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def test_compiled_nnx_step_trains_its_modules_in_place():
    fn, x = fp8_transform(nnx_step), normal(1, 8, D)
    wanted = nnx_arguments()
    losses = [fn(*wanted, x) for _ in range(2)]
    modules = nnx_arguments()
    compiled = fn.lower(*modules, x).compile()
    before = jax.tree.leaves(nnx.state(modules))
    assert [compiled(*modules, x) for _ in range(2)] == losses
    assert all(leaf.is_deleted() for leaf in before)
    chex.assert_trees_all_equal(modules[0].down.kernel[...], wanted[0].down.kernel[...])
    assert int(modules[1].step[...]) == 2


def test_what_is_compiled_keeps_no_array_of_the_call_it_was_lowered_for():
    modules, x = nnx_arguments(), normal(1, 8, D)
    kernel = weakref.ref(modules[0].up.kernel[...])
    compiled = fp8_transform(nnx_step).lower(*modules, x).compile()
    del modules
    gc.collect()
    assert kernel() is None
    compiled(*nnx_arguments(), x)
