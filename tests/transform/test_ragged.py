"""`fp8_transform` puts `jax.lax.ragged_dot` and its gradients in FP8."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.nnx
from fp8jax import fp8_transform, ops, recipes
from fp8jax.testing import assert_same_bits

M, K, HIDDEN, G = 96, 256, 384, 4

pytestmark = pytest.mark.usefixtures("one_device")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "gate": normal(0, G, K, HIDDEN) / 16,
    "up": normal(1, G, K, HIDDEN) / 16,
    "down": normal(2, G, HIDDEN, K) / 20,
    "scale": 1 + 0.1 * normal(4, K),  # Before them all: each has a dgrad.
}
KERNELS = "down", "gate", "up"
X, SIZES = normal(3, M, K), jnp.array([40, 0, 30, 16], jnp.int32)


def experts(dot, params, x, sizes):
    x = x * params["scale"]
    gate, up = dot(x, params["gate"], sizes), dot(x, params["up"], sizes)
    return dot(jax.nn.silu(gate) * up, params["down"], sizes)


def step_of(dot):
    def step(params, x, sizes):
        def loss(params):
            return (experts(dot, params, x, sizes) ** 2).mean()

        return jax.value_and_grad(loss)(params)

    return step


PLAIN = step_of(jax.lax.ragged_dot)
ROLES = [(path, role) for path in KERNELS for role in ("dgrad", "fprop", "wgrad")]


def roles(report, status="fp8"):
    return sorted((row.path, row.role) for row in report.rows if row.status == status)


@pytest.mark.parametrize(
    "recipe",
    [recipes.deepseek_v3(), recipes.deepseek_v3(residual="fp8"), recipes.bf16_wgrad()],
    ids=["bf16", "fp8", "bf16_wgrad"],
)
def test_whole_step_has_the_bits_of_products_written_by_hand(recipe):
    ours = fp8_transform(PLAIN, recipe)
    by_hand = step_of(functools.partial(fp8jax.ragged_dot, recipe=recipe))
    expected = jax.jit(by_hand)(PARAMS, X, SIZES)
    assert_same_bits(jax.jit(ours)(PARAMS, X, SIZES), expected)
    plain = jax.jit(PLAIN)(PARAMS, X, SIZES)
    assert not np.array_equal(expected[1]["scale"], plain[1]["scale"])


def test_forward_function_brings_its_gradients_along():
    forward = functools.partial(experts, jax.lax.ragged_dot)
    transformed = fp8_transform(forward)
    report = transformed.report(PARAMS, X, SIZES)
    assert roles(report) == [(path, "fprop") for path in KERNELS]

    def loss(forward, params, x):
        return (forward(params, x, SIZES) ** 2).mean()

    run = jax.jit(jax.value_and_grad(loss, (1, 2)), static_argnums=0)
    by_hand = functools.partial(experts, fp8jax.ragged_dot)
    assert_same_bits(run(transformed, PARAMS, X), run(by_hand, PARAMS, X))


def test_report_has_each_role_with_its_sizes():
    report = fp8_transform(PLAIN).report(PARAMS, X, SIZES)
    assert roles(report) == ROLES
    assert report.fraction == 1
    found = {(row.path, row.role): row for row in report.rows}
    sizes = {
        ("gate", "fprop"): (M, HIDDEN, K),
        ("gate", "dgrad"): (M, K, HIDDEN),
        ("gate", "wgrad"): (K, HIDDEN, M),
        ("down", "fprop"): (M, K, HIDDEN),
        ("down", "wgrad"): (HIDDEN, K, M),
    }
    for key, (m, n, k) in sizes.items():
        row = found[key]
        assert (row.m, row.n, row.k) == (m, n, k)
        assert row.flops == 2 * m * n * k
        assert row.kernel == "xla"
        wgrad = row.role == "wgrad"
        assert row.tiles == ("1x128 1x128" if wgrad else "1x128 128x128")


def test_rules_choose_among_experts_as_among_layers():
    rules = [
        fp8jax.Rule("gate", None, "not this one"),
        fp8jax.Rule("up", None, "not here", roles=("wgrad",)),
    ]
    report = fp8_transform(PLAIN, rules=rules).report(PARAMS, X, SIZES)
    skipped = [("gate", "dgrad"), ("gate", "fprop"), ("gate", "wgrad"), ("up", "wgrad")]
    assert roles(report, "skipped") == skipped


def test_twice_is_once_and_its_rows_are_ours():
    once = fp8_transform(PLAIN)
    twice = fp8_transform(once)
    arguments = PARAMS, X, SIZES
    assert_same_bits(jax.jit(twice)(*arguments), jax.jit(once)(*arguments))
    rows = twice.report(*arguments).rows
    assert sorted(row.role for row in rows) == sorted(role for _, role in ROLES)
    assert {row.reason for row in rows} == {"by fp8jax itself"}
    fprop = next(row for row in rows if row.role == "fprop")
    assert (fprop.path, fprop.m, fprop.n, fprop.k) == ("gate", M, HIDDEN, K)


def test_in_scan_and_remat_it_is_the_same():
    stacked = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), PARAMS)

    def step(dot, params, x):
        @jax.checkpoint
        def layer(x, params):
            return x + experts(dot, params, x, SIZES), None

        def loss(params):
            return (jax.lax.scan(layer, x, params)[0] ** 2).mean()

        return jax.value_and_grad(loss)(params)

    ours = fp8_transform(functools.partial(step, jax.lax.ragged_dot))
    report = ours.report(stacked, X)
    assert {"fprop", "recompute", "dgrad", "wgrad"} == {r for _, r in roles(report)}
    assert not roles(report, "skipped")
    by_hand = functools.partial(step, fp8jax.ragged_dot)
    # The same codes: float32 sums in a program that is fused otherwise.
    chex.assert_trees_all_close(
        jax.jit(ours)(stacked, X), jax.jit(by_hand)(stacked, X), rtol=1e-5, atol=1e-6
    )


def test_mixture_of_experts_is_the_one_of_the_layer_in_fp8():
    def layer(recipe):
        model = fp8jax.nnx.MoE(
            K, HIDDEN, G, top_k=2, num_shared=1, rngs=nnx.Rngs(0), recipe=recipe
        )
        model.shared.recipe = recipe
        return model

    def step(model, x):
        return nnx.value_and_grad(lambda m, x: (m(x) ** 2).mean())(model, x)

    plain, ours = layer(recipes.bf16()), layer(None)
    transformed = fp8_transform(step)
    report = transformed.report(plain, X)
    kernels = [
        f"{part}/{side}/kernel"
        for part in ("experts", "shared")
        for side in ("down", "gate", "up")
    ]
    every = {(path, r) for path in kernels for r in ("dgrad", "fprop", "wgrad")}
    # Nothing before gate and up is trained; nor does that tell their wgrads apart.
    found = {(p, role) for path, role in roles(report) for p in path.split(" | ")}
    assert found == every - {(p, "dgrad") for p in kernels if "down" not in p}
    assert {row.path for row in report.rows if row.status == "skipped"} == {
        "router/kernel"
    }
    value, gradients = transformed(plain, X)
    expected, of_ours = nnx.jit(step)(ours, X)
    # Two in a thousand codes may move by 2^-3 where the activation is fused: 2^-7.5 of
    # a gradient as below, and less of a mean.
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    np.testing.assert_array_equal(plain.router.load[...], ours.router.load[...])
    for a, e in zip(
        jax.tree.leaves(nnx.to_pure_dict(gradients)),
        jax.tree.leaves(nnx.to_pure_dict(of_ours)),
        strict=True,
    ):
        # The layer's activation is fused: codes at ties.
        assert fp8jax.numerics.sqnr_db(a, e) > 40


def test_other_products_of_rows_in_groups_stay_and_are_named():
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (0,)), ((), ())),
        lhs_ragged_dimensions=(1,),
        rhs_group_dimensions=(),
    )

    def contracts_groups(params, x):
        return jax.lax.ragged_dot_general(x, params, SIZES, numbers)

    w = normal(0, K, HIDDEN)
    (row,) = fp8_transform(contracts_groups).report(w, X).rows
    assert (row.status, row.flops) == ("skipped", 2 * M * K * HIDDEN)
    assert row.reason == "ragged_dot_general: no FP8 kernel for it yet"

    def weight_first(params, x):
        return jax.lax.ragged_dot(params["rows"], x, SIZES)

    (row,) = fp8_transform(weight_first).report({"rows": X}, PARAMS["gate"]).rows
    assert row.reason == "ragged_dot: a fprop whose weight is no matrix for each group"


def test_statistics_leave_them_out_and_say_so():
    def step(params, x):
        def loss(params):
            y = experts(jax.lax.ragged_dot, params, x @ params["dense"], SIZES)
            return (y**2).mean()

        return jax.value_and_grad(loss)(params)

    params = {**PARAMS, "dense": normal(5, K, K) / 16}
    ours = fp8_transform(step, stats=True)
    assert any("rows in groups" in note for note in ours.report(params, X).notes)
    _, stats = ours(params, X)
    assert set(stats) == {"dense"}


def test_differentiating_a_whole_step_is_refused_by_name():
    q = functools.partial(
        ops.quantized_ragged_dot,
        form="fprop",
        lhs_spec=fp8jax.TILE_1X128,
        rhs_spec=fp8jax.BLOCK_128X128,
        out_dtype=jnp.float32,
    )
    with pytest.raises(TypeError, match="quantized_ragged_dot has no gradient"):
        jax.grad(lambda x: q(x, PARAMS["gate"], SIZES).sum())(X)
