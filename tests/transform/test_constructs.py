"""What is not handled stays exactly as it is, and the report says so."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from fp8jax.transform import fp8_transform

D = 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {"a": normal(0, D, D), "b": normal(1, D, D)}
X = normal(9, 128, D)
KEY = jax.random.key(1)


def layer(params, x):
    return jnp.tanh(x @ params["a"])


def statuses(report):
    return [(r.path, r.role, r.status) for r in report.rows]


def check_left_alone(rest, reason, params=PARAMS):
    """`rest` of the rewritten function sees only that its input is in FP8."""

    def forward(params, x):
        return rest(params, layer(params, x))

    fn = fp8_transform(forward)
    report = fn.report(params, X)
    assert statuses(report)[0] == ("a", "fprop", "fp8")
    others = report.rows[1:]
    assert others, "what is left alone must be reported"
    for row in others:
        assert row.status == "skipped"
        assert reason in row.reason
    fp8_layer = fp8_transform(layer)(params, X)
    # What is left alone is the same float32 arithmetic, fused otherwise: some ulps.
    chex.assert_trees_all_close(
        fn(params, X), jax.jit(rest)(params, fp8_layer), rtol=1e-6
    )


@jax.custom_vjp
def hand_written(w, x):
    return x @ w


hand_written.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, dy: (r[1].T @ dy, dy @ r[0].T)
)


@jax.custom_jvp
def hand_written_forward(w, x):
    return x @ w


hand_written_forward.defjvps(None, lambda dx, y, w, x: dx @ w)


def test_hand_written_vjp_is_left_alone():
    check_left_alone(lambda p, x: hand_written(p["b"], x), "hand-written VJP")


def test_hand_written_jvp_is_left_alone():
    check_left_alone(lambda p, x: hand_written_forward(p["b"], x), "hand-written VJP")


def test_linear_solver_is_left_alone():
    def rest(params, x):
        return jax.lax.custom_linear_solve(
            lambda v: v + v @ params["b"] * 1e-3,
            x,
            lambda matvec, v: v - (matvec(v) - v),
            transpose_solve=lambda vecmat, v: v,
        )

    check_left_alone(rest, "inside custom_linear_solve")


def test_pallas_kernel_is_left_alone():
    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    def rest(params, x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, interpret=True)(x, params["b"])

    check_left_alone(rest, "inside pallas_call")


def test_convolution_is_reported_with_its_flops():
    def rest(params, x):
        kernel = params["b"][:3, :3][None, None]
        return jax.lax.conv(x[None, None], kernel, (1, 1), "SAME")[0, 0]

    check_left_alone(rest, "no FP8 kernel for it yet")
    (conv,) = fp8_transform(lambda p, x: rest(p, x)).report(PARAMS, X).rows
    assert conv.flops == 2 * 128 * D * 9


def test_while_loop_of_unknown_length_is_entered():
    def forward(params, x):
        def body(state):
            i, x = state
            return i + 1, layer(params, x)

        return jax.lax.while_loop(lambda state: state[0] < 2, body, (0, x))[1]

    fn = fp8_transform(forward)
    assert statuses(fn.report(PARAMS, X)) == [("a", "fprop", "fp8")]
    single = fp8_transform(layer)
    chex.assert_trees_all_equal(fn(PARAMS, X), single(PARAMS, single(PARAMS, X)))


def test_callbacks_randomness_and_named_scopes_stay(capfd):
    def forward(params, x, key):
        with jax.named_scope("noisy"):
            x = layer(params, x) + jax.random.normal(key, x.shape)
        jax.debug.print("shift {}", params["a"][0, 0] * 0)
        return x

    fn = fp8_transform(forward)
    key = jax.random.key(1)
    out = fn(PARAMS, X, key)
    jax.effects_barrier()
    assert "shift 0.0" in capfd.readouterr().out
    noise = jax.random.normal(key, X.shape)
    clean = fp8_transform(layer)(PARAMS, X)
    # One addition, which XLA may contract with a multiplication.
    chex.assert_trees_all_close(out, clean + noise, rtol=1e-5, atol=1e-6)
    assert "noisy" in fn.lower(PARAMS, X, key).as_text(debug_info=True)


def test_one_operand_of_an_einsum_of_three_is_the_weight():
    def forward(params, x):  # The path multiplies x by c first, of its own batch.
        c = jnp.cos(x)
        return jnp.einsum("tk,td,df->kf", c, x, params["a"])

    fn = fp8_transform(forward)
    rows = fn.report(PARAMS, X).rows
    assert len(rows) == 2
    assert sorted(r.status for r in rows) == ["fp8", "skipped"]
    plain, out = jax.jit(forward)(PARAMS, X), fn(PARAMS, X)
    assert not np.array_equal(out, plain)
    # Rounding to E4M3 has an rms of 2.6 % to 3.6 %, twice: 5 %. Doubled.
    assert np.linalg.norm(out - plain) < 0.1 * np.linalg.norm(plain)


def test_map_and_associative_scan_are_entered_and_scan_counts_runs():
    def forward(params, x):
        x = jax.lax.map(lambda row: layer(params, row), x.reshape(4, 32, D))
        sums = jax.lax.associative_scan(jnp.add, x)
        return sums, jax.lax.associative_scan(lambda a, b: a @ b, sums[:, :, :32])

    fn = fp8_transform(forward)
    first, *products = fn.report(PARAMS, X).rows
    assert (first.path, first.status, first.count) == ("a", "fp8", 4)
    assert products
    assert {r.status for r in products} == {"skipped"}
    x = jax.lax.map(lambda row: fp8_transform(layer)(PARAMS, row), X.reshape(4, 32, D))
    # Four numbers below one: three roundings, each of half a unit in the last place.
    sums = np.cumsum(np.asarray(x, np.float64), 0)
    np.testing.assert_allclose(fn(PARAMS, X)[0], sums, rtol=0, atol=3 * 2.0**-23)


def test_fft_and_complex_products_stay_beside_layers():
    def rest(params, x):
        spectrum = jnp.fft.rfft(x)
        filters = params["b"][: spectrum.shape[1]].astype(spectrum.dtype)
        return jnp.abs(spectrum), jnp.abs(spectrum @ filters)

    check_left_alone(rest, "dtype complex64")


def test_integer_products_stay_beside_layers():
    def rest(params, x):
        codes = jnp.round(params["b"] * 100).astype(jnp.int8)
        steps = jnp.round(x * 100).astype(jnp.int8)
        return jnp.matmul(steps, codes, preferred_element_type=jnp.int32)

    check_left_alone(rest, "dtype int8")


def test_operands_that_are_fp8_already_stay_beside_layers():
    def rest(params, x):
        operands = (a.astype(jnp.float8_e4m3fn) for a in (x, params["b"]))
        return jnp.matmul(*operands, preferred_element_type=jnp.float32)

    check_left_alone(rest, "already FP8: float8_e4m3fn")


def test_float64_products_stay_and_float32_ones_change_with_64_bit_types_on():
    def forward(params, x):
        x = layer(params, x)
        return x, x.astype(jnp.float64) @ params["b"].astype(jnp.float64)

    with jax.enable_x64(True):
        fn = fp8_transform(forward)
        rows = fn.report(PARAMS, X).rows
        assert [r.status for r in rows] == ["fp8", "skipped"]
        assert rows[1].reason == "dtype float64"
        narrow, wide = fn(PARAMS, X)
        b = np.asarray(PARAMS["b"], np.float64)
        # Float64 sums of D products in two orders: D 2^-53 = 1.4e-14 of magnitudes that
        # add up to some ten times a result that is not near zero.
        np.testing.assert_allclose(wide, np.asarray(narrow, np.float64) @ b, rtol=1e-12)
    chex.assert_trees_all_equal(narrow, fp8_transform(layer)(PARAMS, X))


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: jnp.fft.fft(x).real, X),
        (lambda x: jax.lax.associative_scan(jnp.add, x), X),
        (lambda key: jax.random.normal(jax.random.split(key)[0], (3,)), KEY),
        (lambda x: jax.lax.cumsum(jax.lax.sort(x)), X),
    ],
    ids=["fft", "associative_scan", "keys", "sort"],
)
def test_function_without_products_is_the_plain_one(function, x):
    fn = fp8_transform(function)
    assert fn.report(x).rows == ()
    with pytest.warns(UserWarning, match="no matrix product"):
        out = fn(x)
    chex.assert_trees_all_equal(out, jax.jit(function)(x))


def test_callbacks_see_the_rewritten_values_and_effects_stay_in_order():
    seen = []

    def forward(params, x, *, tag):
        x = layer(params, x)
        jax.debug.callback(lambda v: seen.append((tag, np.asarray(v))), x, ordered=True)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        y = jax.pure_callback(lambda v: np.asarray(v) * 2, shape, x)
        jax.debug.callback(lambda v: seen.append((tag, np.asarray(v))), y, ordered=True)
        return y

    fn = fp8_transform(forward, static_argnames="tag")
    assert statuses(fn.report(PARAMS, X, tag="mine")) == [("a", "fprop", "fp8")]
    assert not seen
    with jax.default_device(None):  # Ordered effects take no device of ours.
        out = fn(PARAMS, X, tag="mine")
        jax.effects_barrier()
    assert [tag for tag, _ in seen] == ["mine", "mine"]
    np.testing.assert_array_equal(seen[1][1], 2 * seen[0][1])
    np.testing.assert_array_equal(out, seen[1][1])


def test_hand_written_gradient_in_a_whole_step_is_rewritten_as_written_out():
    # JAX's derivative has put its rules in place of the function: plain products.
    def step(params, x):
        def loss(params):
            x_a = layer(params, x)
            return jnp.mean(jnp.square(hand_written(params["b"], x_a)))

        return jax.value_and_grad(loss)(params)

    found = {
        (r.path, r.role): r.status for r in fp8_transform(step).report(PARAMS, X).rows
    }
    layers = {("b", "fprop"), ("b", "wgrad"), ("b", "dgrad")}
    assert found == dict.fromkeys(layers | {("a", "fprop"), ("a", "wgrad")}, "fp8")
