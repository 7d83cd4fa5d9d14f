"""The transform's numbers are those of the model written with `fp8jax.dot_general`."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import recipes
from fp8jax.transform import _plan, fp8_transform

D, HIDDEN = 128, 256
DIMS = (((2,), (0,)), ((), ()))  # [batch, time, d] times [d, f]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X = normal(9, 2, 96, D)  # 192 tokens: wgrad has a short chunk.
LAYER = {"up": normal(0, D, HIDDEN) * 0.1, "down": normal(1, HIDDEN, D) * 0.1}
STACKED = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), LAYER)


def block(dot, layer, x):
    up, down = (layer[name].astype(x.dtype) for name in ("up", "down"))
    return x + dot(jax.nn.silu(dot(x, up, DIMS)), down, DIMS)


def scanned(dot, params, x):
    body = jax.checkpoint(lambda x, layer: (block(dot, layer, x), None))
    return jax.lax.scan(body, x, params)[0]


def step_of(forward):
    def step(params, x):
        def loss(params):
            return jnp.mean(jnp.square(forward(params, x).astype(jnp.float32)))

        return jax.value_and_grad(loss)(params)

    return step


def plain(model):
    return functools.partial(model, jax.lax.dot_general)


def run(fn, *args):
    # XLA may skip a rounding to bfloat16 between two fused operations, and what it
    # fuses depends on the functions' borders: not what is tested here.
    options = {"xla_allow_excess_precision": False}
    return jax.jit(fn, compiler_options=options)(*args)


@pytest.mark.parametrize(
    ("model", "params", "dtype"),
    [(block, LAYER, jnp.float32), (scanned, STACKED, jnp.bfloat16)],
    ids=["one", "scan"],
)
def test_both_placements_equal_the_model_of_fp8_products_bit_for_bit(
    model, params, dtype
):
    x = X.astype(dtype)
    wanted = run(step_of(functools.partial(model, fp8jax.dot_general)), params, x)
    whole = fp8_transform(step_of(plain(model)))
    assert whole.report(params, x).fraction == 1.0
    chex.assert_trees_all_equal(run(whole, params, x), wanted)
    inside = step_of(fp8_transform(plain(model)))
    chex.assert_trees_all_equal(run(inside, params, x), wanted)
    unquantized = run(step_of(plain(model)), params, x)
    assert not np.array_equal(unquantized[1]["up"], wanted[1]["up"])


def test_weight_as_the_first_operand_has_the_same_bits_in_both_placements():
    def forward(params, x):  # [f, d] times [b, t, d], features first in the result
        return jax.lax.dot_general(params["w"], x, (((1,), (2,)), ((), ())))

    params = {"w": normal(3, HIDDEN, D)}
    whole = fp8_transform(step_of(forward))
    assert whole.report(params, X).fraction == 1.0
    inside = jax.jit(step_of(fp8_transform(forward)))
    chex.assert_trees_all_equal(whole(params, X), inside(params, X))


@pytest.mark.parametrize("role", ["wgrad", "dgrad"])
def test_wrong_tiles_in_a_role_change_bits(monkeypatch, role):
    # With power-of-two scales a wrong tile hides: it moves exponents, not mantissas.
    recipe = recipes.deepseek_v3(scale="fp32")
    step = step_of(plain(block))
    wanted = fp8_transform(step, recipe)(LAYER, X)
    right = _plan._gemm

    def wrong(recipe, asked):  # Activations or gradients in 128x128 tiles.
        gemm = right(recipe, asked)
        if asked != role:
            return gemm
        block_spec = dataclasses.replace(gemm.lhs, tile=(128, 128))
        return dataclasses.replace(gemm, lhs=block_spec)

    monkeypatch.setattr(_plan, "_gemm", wrong)
    got = fp8_transform(step, recipe)(LAYER, X)
    assert not np.array_equal(got[1]["up"], wanted[1]["up"])


def test_bf16_recipe_is_the_identity_and_the_plain_step_never_changes():
    step = jax.jit(step_of(plain(scanned)))
    before = step(STACKED, X)
    off = fp8_transform(step, recipes.bf16())
    assert off.report(STACKED, X).fraction == 0.0
    chex.assert_trees_all_equal(off(STACKED, X), before)
    quantized = fp8_transform(step)(STACKED, X)
    assert not np.array_equal(quantized[0], before[0])
    chex.assert_trees_all_equal(step(STACKED, X), before)


def count_marked(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("name=fp8jax_gemm")


def test_transforming_twice_is_transforming_once():
    once = fp8_transform(step_of(plain(block)))
    twice = fp8_transform(once)
    chex.assert_trees_all_equal(twice(LAYER, X), once(LAYER, X))
    assert count_marked(twice, LAYER, X) == count_marked(once, LAYER, X) > 0
    roles = [(r.role, r.status) for r in once.report(LAYER, X).rows]
    assert [(r.role, r.status) for r in twice.report(LAYER, X).rows] == roles


def test_step_of_a_transformed_forward_is_not_quantized_again():
    inside = step_of(fp8_transform(plain(block)))
    both = fp8_transform(inside)
    chex.assert_trees_all_equal(both(LAYER, X), jax.jit(inside)(LAYER, X))
    assert count_marked(both, LAYER, X) == count_marked(inside, LAYER, X) > 0
    rows = both.report(LAYER, X).rows
    assert {r.reason for r in rows} == {"by fp8jax itself"}
    roles = sorted(r.role for r in rows)
    assert roles == ["dgrad", "dgrad", "fprop", "fprop", "wgrad", "wgrad"]


def test_preferred_element_type_reaches_the_replacement():
    def forward(params, x):
        w = params["up"].astype(x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    out = fp8_transform(forward)(LAYER, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32
    # Not a rounded bfloat16 in disguise.
    assert not np.array_equal(out, out.astype(jnp.bfloat16).astype(jnp.float32))
