"""Errors are short and say by the user's own names what came and what is allowed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fp8jax
from fp8jax.transform import fp8_transform

D = 128
PARAMS = {"layer": {"w": jnp.ones((D, D))}, "bias": jnp.ones(D)}
X = jnp.ones((8, D))


@pytest.mark.parametrize(
    "value",
    [
        PARAMS,
        X,
        nnx.state(nnx.Linear(D, D, rngs=nnx.Rngs(0))),
        [PARAMS] * 50,
        fp8jax.quantize(PARAMS["layer"]["w"], fp8jax.BLOCK_128X128),
    ],
)
def test_arrays_in_the_place_of_a_function_are_told_by_their_types(value):
    with pytest.raises(
        ValueError, match="fp8_transform takes a function, got"
    ) as error:
        fp8_transform(value)
    text = str(error.value)
    assert len(text) < 400
    assert "fp8_transform(function)(params, ...)" in text
    assert "[1., 1." not in text


def test_arrays_in_the_place_of_options_are_told_by_their_types():
    for options in ({"recipe": PARAMS}, {"rules": [PARAMS]}, {"weights": {1.0: X}}):
        with pytest.raises(ValueError, match="fp8_transform takes") as error:
            fp8_transform(lambda x: x, **options)
        assert len(str(error.value)) < 400
        assert "array(" not in str(error.value).lower()


def test_linen_module_is_sent_to_its_apply():
    with pytest.raises(ValueError, match=r"a Linen module, Dense.*\(module\.apply\)"):
        fp8_transform(nn.Dense(8))


def branching(params, x, *, train):
    y = x @ params["layer"]["w"]
    return y if train else -y


def nested(params, config):
    return params["bias"] if config["train"] else -params["bias"]


def sized(params, n):
    return params["bias"] * jnp.zeros(n)


def by_module(model, x, train):
    return model(x) if train else x


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "argument"),
    [
        (branching, (PARAMS, X), {"train": True}, "train"),
        (nested, (PARAMS, {"train": True}), {}, "config['train']"),
        (sized, (PARAMS, 3), {}, "n"),
        (by_module, (nnx.Linear(D, D, rngs=nnx.Rngs(0)), X, True), {}, "train"),
    ],
)
def test_traced_value_in_a_branch_is_named_as_the_user_named_it(
    fn, args, kwargs, argument
):
    with pytest.raises(TypeError) as error:
        fp8_transform(fn)(*args, **kwargs)
    text = str(error.value)
    assert f"the function {fn.__name__} at {__file__}" in text
    assert f"of the argument {argument}." in text
    notes = "".join(error.value.__notes__)
    assert f"fp8_transform({fn.__name__}) traces the function" in notes
    assert "static_argnames" in notes


def test_disabled_jit_runs_the_transformed_function():
    with jax.disable_jit():
        y = fp8_transform(lambda params, x: x @ params["layer"]["w"])(PARAMS, X)
    assert jnp.all(y == D)
