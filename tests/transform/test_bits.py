"""The transform's numbers are those of the model written with `fp8jax.dot_general`."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import ops, recipes
from fp8jax.transform import fp8_transform
from fp8jax.transform.plan._policy import Policy

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


def dense_step(w, x, dout):
    """A layer's output and its gradients of `w` and `x`."""

    def loss(w, x):
        y = x @ w
        return jnp.sum(y * dout), y

    (dw, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(w, x)
    return {"fprop": y, "dgrad": dx, "wgrad": dw}


def expected_tiles(w, x, dout):
    """`dense_step` of quantized matrices, every one with its tiles spelled out.

    The scales are float32: with powers of two another tile's scale moves exponents,
    and most products keep their bits.
    """

    def product(lhs, lhs_tile, rhs, rhs_tile):  # Contraction last.
        q_lhs, q_rhs = (
            fp8jax.quantize(a, fp8jax.QuantSpec(tile=tile, scale="fp32"))
            for a, tile in ((lhs, lhs_tile), (rhs, rhs_tile))
        )
        return fp8jax.scaled_matmul(q_lhs, q_rhs, out_dtype=jnp.float32)

    return {
        "fprop": product(x, (1, 128), w.T, (128, 128)),
        "dgrad": product(dout, (1, 128), w, (128, 128)),
        "wgrad": product(x.T, (1, 128), dout.T, (1, 128)),
    }


def fp8_dense_step():
    recipe = recipes.deepseek_v3(scale="fp32")
    arguments = normal(0, 256, 384), normal(1, 192, 256), normal(2, 192, 384)
    fn = fp8_transform(dense_step, recipe, weights="w")
    assert fn.report(*arguments).fraction == 1.0
    return fn(*arguments), expected_tiles(*arguments)


def differing(got, wanted):
    return {role for role in got if not np.array_equal(got[role], wanted[role])}


def test_each_role_has_the_bits_of_its_tiles():
    chex.assert_trees_all_equal(*fp8_dense_step())


@pytest.mark.parametrize(
    ("role", "side"),
    [("wgrad", "lhs"), ("wgrad", "rhs"), ("dgrad", "lhs")],
    ids=["x_in_wgrad", "dout_in_wgrad", "dout_in_dgrad"],
)
def test_blocks_where_tiles_belong_change_just_that_role_s_bits(
    monkeypatch, role, side
):
    right = Policy.gemm

    def wrong(policy, path, asked, k, n):
        gemm, reason = right(policy, path, asked, k, n)
        if asked != role:
            return gemm, reason
        in_blocks = dataclasses.replace(getattr(gemm, side), tile=(128, 128))
        return dataclasses.replace(gemm, **{side: in_blocks}), reason

    monkeypatch.setattr(Policy, "gemm", wrong)
    assert differing(*fp8_dense_step()) == {role}


def test_quantizing_an_operand_twice_changes_bits(monkeypatch):
    right = ops.quantize_operand

    spec = dataclasses.replace(fp8jax.TILE_1X128, scale="fp32")

    def twice(x, *args):
        once = fp8jax.quantize(x, spec)
        return right(once.dequantize(x.dtype), *args)

    monkeypatch.setattr(ops, "quantize_operand", twice)
    jax.clear_caches()  # JAX may have traced the same quantization before.
    try:
        # The same tiles again give the same codes; along the other dimension they do
        # not.
        assert "wgrad" in differing(*fp8_dense_step())
    finally:
        jax.clear_caches()


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
    return str(jax.make_jaxpr(fn)(*args)).count("name=fp8jax::gemm")


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
