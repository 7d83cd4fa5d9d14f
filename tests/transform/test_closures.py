"""Weights that a function was given for good: found where they can be, or said so."""

import functools
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp8jax.transform import fp8_transform

D, ROWS = 128, 64


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = normal(9, ROWS, D)
PARAMS = {"w": normal(0, D, D)}


class Network(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(D, D, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.tanh(self.layer(x))

    def loss(self, x):
        return jnp.mean(self(x) ** 2)


class Module(eqx.Module):
    w: jax.Array
    activation: object = jnp.tanh

    def __call__(self, x):
        return self.activation(x @ self.w)


def forward(params, x, scale=None):
    y = x @ params["w"]
    return y if scale is None else y * scale


def step(params, x, causal=True):
    assert isinstance(causal, bool)
    return jax.value_and_grad(lambda params: jnp.mean(forward(params, x) ** 2))(params)


DENSE = nn.Dense(D)
GIVEN = {
    "an NNX module": Network,
    "its method": lambda: Network().loss,
    "an Equinox module": lambda: Module(PARAMS["w"]),
    "partial of a function": lambda: functools.partial(forward, PARAMS),
    "partial by name": lambda: functools.partial(forward, scale=X),
    "partial of a step": lambda: functools.partial(step, PARAMS),
    "partial with an option": lambda: functools.partial(step, PARAMS, causal=True),
    "partial of Linen's apply": lambda: functools.partial(
        DENSE.apply, DENSE.init(jax.random.key(0), X)
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", GIVEN)
def test_weights_of_what_is_transformed_are_found(name):
    fn = GIVEN[name]()
    args = (PARAMS, X) if name == "partial by name" else (X,)
    fp8 = fp8_transform(fn)
    assert fp8.report(*args).fraction == 1
    for got, exact in zip(
        jax.tree.leaves(fp8(*args)), jax.tree.leaves(fn(*args)), strict=True
    ):
        # 3 bits of mantissa in each operand; errors of one product of each.
        error = jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)
        assert 0 < error < 2**-3


@pytest.mark.usefixtures("standard_promotion")
def test_model_s_new_arrays_are_those_of_the_next_call():
    model = Network()
    fp8 = fp8_transform(model)
    before = fp8(X)
    model.layer.kernel[...] = 2 * model.layer.kernel[...]
    np.testing.assert_allclose(
        jnp.arctanh(fp8(X)), 2 * jnp.arctanh(before), rtol=1e-3, atol=1e-4
    )


CLOSED = {
    "a lambda": lambda x: x @ PARAMS["w"],
    "a lambda of a transposed weight": lambda x: x @ PARAMS["w"].T,
    "a step": lambda x: step(PARAMS, x),
    "a scan": lambda x: jax.lax.scan(lambda x, _: (x @ PARAMS["w"], None), x, length=2),
    "a jit": jax.jit(lambda x: x @ PARAMS["w"]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_weights_in_a_closure_are_said_to_be_there_and_no_input_is_named(name):
    fp8 = fp8_transform(CLOSED[name])
    reasons = {row.reason for row in fp8.report(X).rows}
    assert reasons
    assert all("closes over" in reason for reason in reasons)
    assert not any("weights=" in reason for reason in reasons)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp8(X)
    assert any("found no matrix product" in str(w.message) for w in caught)


@pytest.mark.parametrize("turned", [False, True])
def test_hint_names_the_weight_and_not_the_input(turned):
    def fn(x, scale, batch):
        w = batch["w"].T if turned else batch["w"]
        return (x @ w) * scale

    (row,) = fp8_transform(fn).report(X, X, PARAMS).rows
    expected = "would be in FP8 if batch/w were a parameter: name it in weights="
    assert row.reason == expected


def test_function_is_shown_and_warned_of_by_its_name():
    assert repr(fp8_transform(step)) == "fp8_transform(step)"
    assert repr(fp8_transform(functools.partial(step, PARAMS))) == "fp8_transform(step)"
    assert repr(fp8_transform(Module(X))) == "fp8_transform(Module)"
