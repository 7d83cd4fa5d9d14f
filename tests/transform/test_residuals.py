"""What the forward pass keeps is never more than without FP8, and less on demand."""

import chex
import jax
import jax.numpy as jnp
import pytest

from fp8jax import recipes
from fp8jax.transform import fp8_transform

D, HIDDEN, TOKENS = 128, 512, 256
FP8 = recipes.deepseek_v3(residual="fp8")


def normal(seed, *shape, dtype=jnp.bfloat16):
    return (jax.random.normal(jax.random.key(seed), shape) * 0.1).astype(dtype)


PARAMS = {
    "up": normal(0, D, HIDDEN),
    "gate": normal(1, D, HIDDEN),
    "down": normal(2, HIDDEN, D),
}
X = normal(9, TOKENS, D)
CODES = 1 + 4 / 128  # Bytes of a code and its share of a float32 scale.


def gated(params, x):
    x = x / (1 + jnp.abs(x))
    return ((x @ params["up"]) * (x @ params["gate"])) @ params["down"]


def relu(params, x):
    return jax.nn.relu(jnp.sin(x) @ params["up"]) @ params["down"]


def step_of(forward):
    def step(params, x):
        return jax.value_and_grad(
            lambda p: jnp.mean(forward(p, x).astype(jnp.float32) ** 2)
        )(params)

    return step


def report_of(forward, params=PARAMS, recipe=None):
    return fp8_transform(step_of(forward), recipe).report(params, X)


def scanned(params, x):
    return jax.lax.scan(lambda x, layer: (x + gated(layer, x), None), x, params)[0]


def rematted(params, x):
    body = jax.checkpoint(lambda x, layer: (x + gated(layer, x), None))
    return jax.lax.scan(body, x, params)[0]


STACKED = jax.tree.map(lambda w: jnp.stack([w] * 3), PARAMS)


def in_float32(params, x):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    return gated(params, x)


@pytest.mark.parametrize("residual", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("forward", "params"),
    [
        (gated, PARAMS),
        (relu, PARAMS),
        (in_float32, jax.tree.map(lambda w: w.astype(jnp.float32), PARAMS)),
        (scanned, STACKED),
        (rematted, STACKED),
    ],
    ids=["gated", "relu", "float32 weights", "scan", "scan and remat"],
)
def test_the_forward_pass_never_keeps_more_than_without_fp8(forward, params, residual):
    report = report_of(forward, params, recipes.deepseek_v3(residual=residual))
    assert 0 < report.residual_bytes <= report.plain_residual_bytes


def test_bytes_are_those_of_the_arrays_that_the_backward_pass_reads():
    report = report_of(gated)
    # The normalized x, both factors of the product, and the product; of the mean,
    # what the float32 result of it needs.
    inputs = TOKENS * D * 2 + 3 * TOKENS * HIDDEN * 2
    of_mean = report.plain_residual_bytes - inputs
    assert of_mean in (TOKENS * D * 2, TOKENS * D * 4)
    assert report.residual_bytes == report.plain_residual_bytes
    assert "Kept for the backward pass" in str(report)


def test_fp8_residuals_save_half_of_every_input_that_only_products_read():
    kept, codes = report_of(gated), report_of(gated, recipe=FP8)
    # The normalized x and the product; its factors are their own derivatives.
    inputs = TOKENS * (D + HIDDEN)
    saved = kept.residual_bytes - codes.residual_bytes
    assert saved == pytest.approx(inputs * (2 - CODES), rel=1e-6)
    assert codes.plain_residual_bytes == kept.residual_bytes


def test_fp8_residuals_of_chained_products_save_a_third_of_all_that_is_kept():
    def chain(params, x):  # Each product's result is read by the next one alone.
        for i in range(4):
            x = (jnp.sin(x) @ params["up"]) @ params["down"] * (i + 1)
        return x

    def live(recipe):
        fn = fp8_transform(step_of(chain), recipe)
        return fn.report(PARAMS, X).residual_bytes

    # A sine keeps its own input for its derivative: D of 2 D + HIDDEN numbers stay.
    assert live(FP8) < 2 / 3 * live(recipes.deepseek_v3())


def test_fp8_residuals_of_scanned_layers_are_stacked_as_codes():
    kept = fp8_transform(step_of(scanned))
    codes = fp8_transform(step_of(scanned), FP8)
    reports = [fn.report(STACKED, X) for fn in (kept, codes)]
    # Of each of three layers the normalized x and the product, as in one.
    saved = reports[0].residual_bytes - reports[1].residual_bytes
    wanted = 3 * TOKENS * (D + HIDDEN) * (2 - CODES)
    assert saved == pytest.approx(wanted, rel=1e-6)
    chex.assert_trees_all_equal(codes(STACKED, X), kept(STACKED, X))
    program = str(codes.trace(STACKED, X).jaxpr)
    stacked = f"f8_e4m3fn[3,{HIDDEN},{TOKENS}]"
    assert stacked in program
    assert stacked not in str(kept.trace(STACKED, X).jaxpr)


def test_fp8_residuals_of_scanned_layers_have_the_same_statistics():
    kept = fp8_transform(step_of(scanned), stats=True)(STACKED, X)
    codes = fp8_transform(step_of(scanned), FP8, stats=True)(STACKED, X)
    chex.assert_trees_all_equal(codes, kept)


def test_forward_functions_have_no_backward_pass_to_keep_anything_for():
    report = fp8_transform(gated).report(PARAMS, X)
    assert report.residual_bytes is None
    assert "Kept" not in str(report)
