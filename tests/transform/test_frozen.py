"""Frozen layers that gradients of trained ones pass are in FP8, without `weights=`."""

import collections

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fp8jax.transform import fp8_transform

D, RANK, ROWS = 128, 8, 64


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = normal(9, ROWS, D)
BASE = [normal(0, D, D), normal(1, D, D)]
ADAPTERS = [(normal(i, D, RANK), normal(i + 1, RANK, D)) for i in (2, 4)]
# Of the second layer both gradients would be computed, of the first none but W's.
FROZEN = {("0", "fprop"): 1, ("1", "fprop"): 1, ("1", "dgrad"): 1}


def forward(base, adapters, x):
    for w, (a, b) in zip(base, adapters, strict=True):
        x = jnp.tanh(x @ w + x @ a @ b)
    return jnp.mean(jnp.square(x))


def in_fp8(report, under=""):
    rows = [
        (r.path.removeprefix(under), r.role)
        for r in report.rows
        if r.status == "fp8" and r.path.startswith(under)
    ]
    assert len(rows) == sum(r.status == "fp8" for r in report.rows)
    return dict(collections.Counter(rows))


def sgd(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def test_base_in_an_argument_of_its_own_is_found():
    def step(adapters, base, x):
        return sgd(adapters, jax.grad(lambda ad: forward(base, ad, x))(adapters))

    report = fp8_transform(step).report(ADAPTERS, BASE, X)
    assert in_fp8(report) == FROZEN


def test_base_in_one_container_with_its_adapters_is_found():
    def step(params, x):
        def loss(adapters):
            return forward(params["base"], adapters, x)

        return sgd(params["adapters"], jax.grad(loss)(params["adapters"]))

    params = {"base": BASE, "adapters": ADAPTERS}
    report = fp8_transform(step).report(params, X)
    assert in_fp8(report, "base/") == FROZEN


def test_base_of_integers_is_found_as_what_it_is_dequantized_to():
    def step(adapters, base, x):
        def loss(adapters):
            weights = [codes.astype(jnp.float32) * scale for codes, scale in base]
            return forward(weights, adapters, x)

        return sgd(adapters, jax.grad(loss)(adapters))

    base = [(jnp.round(w * 100).astype(jnp.int8), normal(7, D)) for w in BASE]
    report = fp8_transform(step).report(ADAPTERS, base, X)
    # With the argument's name: the adapters' first arrays have the same paths.
    assert in_fp8(report) == {(f"base/{i}/0", role): 1 for i, role in FROZEN}


def test_merged_adapter_is_in_fp8_with_the_base_s_path():
    def step(adapters, base, x):
        def loss(adapters):
            merged = [w + a @ b for w, (a, b) in zip(base, adapters, strict=True)]
            return jnp.mean(jnp.square(jnp.tanh(x @ merged[0]) @ merged[1]))

        return sgd(adapters, jax.grad(loss)(adapters))

    report = fp8_transform(step).report(ADAPTERS, BASE, X)
    gradients = {("0", "wgrad"): 1, ("1", "wgrad"): 1}
    assert in_fp8(report) == FROZEN | gradients


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(D, D, rngs=rngs)
        self.adapter = nnx.LoRA(D, RANK, D, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.base(x) + self.adapter(x))


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_base_under_lora_params_is_found():
    layers = nnx.List([Layer(nnx.Rngs(i)) for i in range(2)])

    def step(layers, x):
        def loss(layers, x):
            for layer in layers:
                x = layer(x)
            return jnp.mean(jnp.square(x))

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layers, x)

    report = fp8_transform(nnx.jit(step)).report(layers, X)
    found = {(f"{i}/base/kernel", role): n for (i, role), n in FROZEN.items()}
    assert in_fp8(report) == found


def test_critic_that_gradients_of_a_generator_pass_is_found_and_a_teacher_is_not():
    def mlp(params, x):
        return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1])

    def through(generator, critic, z):
        return jax.grad(lambda g: jnp.mean(mlp(critic, mlp(g, z))))(generator)

    report = fp8_transform(through).report(BASE, [normal(6, D, D), normal(7, D, D)], X)
    assert report.fraction == 1

    def distilled(student, teacher, x):
        def loss(student):
            return jnp.mean(jnp.square(mlp(student, x) - mlp(teacher, x)))

        return jax.grad(loss)(student)

    report = fp8_transform(distilled).report(BASE, [normal(6, D, D), X.T @ X], X)
    skipped = [r.role for r in report.rows if r.status == "skipped"]
    assert skipped == ["other", "other"]


@pytest.mark.parametrize(
    "mixed",
    [
        lambda h, data: data["rows"] @ h,  # A graph's adjacency.
        lambda h, data: h @ data["x"].T @ data["x"],  # Attention to the batch itself.
        lambda h, data: h @ data["keys"].T @ data["keys"],  # To what comes with it.
    ],
)
def test_data_that_gradients_pass_is_no_frozen_weight(mixed):
    def step(params, data):
        def loss(params):
            h = jnp.tanh(data["x"] @ params[0])
            return jnp.mean(jnp.square(mixed(h, data) @ params[1]))

        return jax.grad(loss)(params)

    data = {"x": X, "rows": normal(6, ROWS, ROWS), "keys": normal(7, D, D)}
    report = fp8_transform(step).report(BASE, data)
    rows = {(r.path, r.role) for r in report.rows if r.status == "fp8"}
    assert rows == {(i, role) for i in "01" for role in ("fprop", "wgrad")} | {
        ("1", "dgrad")
    }
