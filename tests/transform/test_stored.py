"""Weights that come as QTensors: products of their codes, and nothing inflated."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
from fp8jax import _compat, _dispatch, recipes

K, N, M, LAYERS = 256, 384, 24, 3
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


def weight(seed, *shape, spec=SPEC):
    w = jax.random.normal(jax.random.key(seed), shape) / shape[-2] ** 0.5
    return fp8jax.quantize(w, spec)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(9), (M, K))


def transformed(fn, **options):
    return fp8jax.fp8_transform(fn, weight_dtype=jnp.float32, **options)


@jax.jit
def product(x, q):
    """Of an activation and codes `[k, n]`."""
    return fp8jax.scaled_matmul(fp8jax.quantize(x), q.T, out_dtype=jnp.float32)


def only_static(report):
    return all("stored in FP8" in row.reason for row in report.rows)


none_left = pytest.mark.filterwarnings("ignore:.*found no matrix product")


@pytest.mark.parametrize(
    ("fn", "shape", "transposed"),
    [
        (lambda w, x: x @ w, (K, N), False),
        (lambda w, x: x @ w.T, (N, K), True),
        (lambda w, x: jnp.einsum("mk,nk->mn", x, w), (N, K), True),
        (lambda w, x: jnp.einsum("abk,kn->abn", x.reshape(4, 6, K), w), (K, N), False),
        (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (K, N), False),
    ],
)
def test_is_the_product_of_the_codes(fn, shape, transposed, x):
    q = weight(0, *shape)
    f = transformed(fn)
    assert only_static(f.report(q, x))
    expected = product(x, q.T if transposed else q)
    chex.assert_trees_all_equal(f(q, x).reshape(expected.shape), expected)


def test_weight_may_come_first(x):
    q = weight(0, N, K)
    f = transformed(lambda w, x: w @ x.T)
    assert only_static(f.report(q, x))
    chex.assert_trees_all_equal(f(q, x), product(x, q.T).T)


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def scanned_in_remat(w, x):
    step = jax.checkpoint(lambda x, w: (x @ w, None))
    return jax.lax.scan(step, x, w)[0]


def indexed(w, x):
    return x @ w[0] @ w[1] @ w[-1]


def indexed_in_a_loop(w, x):
    return jax.lax.fori_loop(0, LAYERS, lambda i, x: x @ w[i], x)


def indexed_in_a_while(w, x):
    def body(state):
        i, x = state
        return i + 1, x @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False)

    # A bound that is an argument keeps the loop from becoming a scan.
    more = jnp.int32(LAYERS) + jnp.int32(0 * x[0, 0])
    return jax.lax.while_loop(lambda state: state[0] < more, body, (0, x))[1]


def branched(w, x):
    def branch(x):
        return x @ w[0] @ w[1] @ w[2]

    return jax.lax.cond(x[0, 0] < 1e9, branch, lambda x: x, x)


@pytest.mark.parametrize(
    "fn",
    [
        scanned,
        scanned_in_remat,
        indexed,
        indexed_in_a_loop,
        indexed_in_a_while,
        branched,
    ],
)
def test_stack_of_layers_is_read_layer_by_layer(fn, x):
    q = weight(1, LAYERS, K, K)
    f = transformed(fn)
    report = f.report(q, x)
    assert report.rows
    assert only_static(report)
    assert report.notes == ()
    expected = x
    for i in range(LAYERS):
        expected = product(expected, jax.tree.map(lambda a, i=i: a[i], q))
    chex.assert_trees_all_equal(f(q, x), expected)
    assert not inflated(f.lower(q, x).as_text(), K * K)


def inflated(program, size):
    """Types of more than 8 bits of at least `size` elements in a lowered program."""
    found = re.findall(r"tensor<((?:\d+x)+)(?:bf16|f16|f32|f64)>", program)
    sizes = {t: np.prod([int(side) for side in t.split("x")[:-1]]) for t in found}
    return {t for t, elements in sizes.items() if elements >= size}


def test_plain_function_inflates():
    q = weight(0, K, N)
    x = jnp.ones((M, K))
    plain = jax.jit(lambda w, x: x @ w.dequantize())
    assert inflated(plain.lower(q, x).as_text(), K * N)


def test_one_activation_is_quantized_once(x):
    p = {name: weight(i, K, N) for i, name in enumerate("qkv")}
    f = transformed(lambda p, x: [x @ p[name] for name in "qkv"])
    names = [str(eqn.params.get("name")) for eqn in f.trace(p, x).jaxpr.eqns]
    assert names.count("fp8jax::quantize") == 1
    assert names.count("fp8jax::stored_dot") == 3
    assert f(p, x)[1].shape == (M, N)


def test_what_is_no_product_reads_an_array_and_the_report_says_so(x):
    p = {"table": weight(0, N, K), "up": weight(1, K, N)}
    f = transformed(lambda p, i: p["table"][i] @ p["up"])
    i = jnp.arange(5)
    report = f.report(p, i)
    assert report.notes == (
        "Dequantized, for what is no product of two matrices: table.",
    )
    chex.assert_trees_all_equal(f(p, i), product(p["table"].dequantize()[i], p["up"]))


class TestReport:
    def rows(self, fn, *args, **options):
        return transformed(fn, **options).report(*args).rows

    def test_path_is_the_weight_s(self, x):
        p = {"layer": {"kernel": weight(0, K, N)}}
        (row,) = self.rows(lambda p, x: x @ p["layer"]["kernel"], p, x)
        assert (row.path, row.role, row.status) == ("layer/kernel", "fprop", "fp8")
        assert (row.m, row.n, row.k, row.tiles) == (M, N, K, "1x128 128x128")

    def test_arrays_beside_qtensors_stay(self, x):
        p = {"a": weight(0, K, K), "b": jnp.ones((K, N))}
        _, row = self.rows(lambda p, x: x @ p["a"] @ p["b"], p, x)
        assert row.status == "skipped"

    @none_left
    def test_default_rules_do_not_count_and_the_users_do(self, x):
        p = {"lm_head": weight(0, K, N)}

        def head(p, x):
            return x @ p["lm_head"]

        (row,) = self.rows(head, p, x)
        assert row.status == "fp8"
        rule = recipes.Rule("lm_head", None, reason="for comparison")
        (row,) = self.rows(head, p, x, rules=[rule])
        assert row.status == "skipped"
        assert "for comparison: its QTensor is dequantized" in row.reason
        # The same float32 products: 256 of them, each of order one, whose sum is off by
        # a few 2^-24 of magnitudes that add up to some 200.
        chex.assert_trees_all_close(
            transformed(head, rules=[rule])(p, x),
            x @ p["lm_head"].dequantize(),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_recipe_decides_on_the_activation(self, x):
        recipe = recipes.deepseek_v3(scale="fp32")
        q = weight(0, K, N)
        f = transformed(lambda w, x: x @ w, recipe=recipe)
        codes = fp8jax.quantize(x, recipe.fprop.lhs)
        expected = fp8jax.scaled_matmul(codes, q.T, out_dtype=jnp.float32)
        chex.assert_trees_all_equal(f(q, x), jax.jit(lambda: expected)())

    @none_left
    @pytest.mark.parametrize(
        ("fn", "q", "reason"),
        [
            (
                lambda w, x: x @ w,
                weight(0, K, N, spec=fp8jax.QuantSpec(tile=(64, 64))),
                "tiles of 64 along the contraction",
            ),
            (
                lambda w, x: jnp.einsum("mk,gkn->gmn", x, w),
                weight(0, 2, K, N),
                "no product of two matrices",
            ),
            (
                lambda w, x: jnp.einsum("gmk,gkn->gmn", jnp.stack([x, x]), w),
                weight(0, 2, K, N),
                "batch dimensions",
            ),
            (lambda w, x: w.T @ w + x.sum(), weight(0, K, N), "an activation"),
        ],
    )
    def test_what_has_no_kernel_is_an_array_there(self, fn, q, reason, x):
        f = transformed(fn)
        (row,) = f.report(q, x).rows
        assert row.status == "skipped"
        assert reason in row.reason
        assert "its QTensor is dequantized" in row.reason
        # As above.
        chex.assert_trees_all_close(
            f(q, x), fn(q.dequantize(), x), rtol=1e-5, atol=1e-5
        )


def test_function_sees_arrays_of_the_dtype_asked_for(x):
    seen = []

    def fn(w, x):
        seen.append((w.shape, w.dtype))
        return x.astype(w.dtype) @ w

    q = weight(0, K, N)
    assert fp8jax.fp8_transform(fn)(q, x).dtype == jnp.bfloat16
    assert transformed(fn)(q, x).dtype == jnp.float32
    dtypes = {str(dtype) for shape, dtype in seen if shape == (K, N)}
    assert dtypes == {"bfloat16", "float32"}
    with pytest.raises(ValueError, match="weight_dtype bfloat16, float16 or float32"):
        fp8jax.fp8_transform(fn, weight_dtype=jnp.int8)


def test_what_is_returned_as_it_came_is_a_qtensor_still(x):
    q = weight(0, K, N)
    same, _ = transformed(lambda w, x: (w, x @ w))(q, x)
    chex.assert_trees_all_equal(same, q)


def test_forward_function_on_one_device_has_no_gradient(x, monkeypatch):
    f = transformed(lambda w, x: (x @ w).sum())
    # What arrays' types do not tell, of one device as of several.
    monkeypatch.setattr(fp8jax.ops, "spread", lambda *arrays: fp8jax.ops.Spread.ONE)
    with pytest.raises(TypeError, match=r"here: .* apply fp8_transform to the whole"):
        jax.grad(f, argnums=1)(weight(0, K, N), x)


def matmul(x, w):
    return x @ w


def by_codes(x, w):
    if not isinstance(w, fp8jax.QTensor):
        return x @ w
    return fp8jax.ops.static_weight_dot("by hand", x, w, out_dtype=x.dtype)


def looped(base, adapters, x, dot):
    for w, a, b in zip(base, adapters["a"], adapters["b"], strict=True):
        x = jnp.tanh(dot(x, w) + x @ a @ b)
    return jnp.mean(x**2)


def scanned_base(base, adapters, x, dot):
    def layer(x, weights):
        w, a, b = weights
        return jnp.tanh(dot(x, w) + x @ a @ b), None

    weights = base, adapters["a"], adapters["b"]
    return jnp.mean(jax.lax.scan(layer, x, weights)[0] ** 2)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_frozen_base_of_a_train_step_is_multiplied_by_its_codes(x, stacked, remat):
    """In fprop, recomputation and dgrad; the adapters' gradients are those of that."""
    base = weight(0, 2, K, K) if stacked else [weight(0, K, K), weight(1, K, K)]
    adapters = {
        "a": jax.random.normal(jax.random.key(2), (2, K, 8)) / 16,
        "b": jax.random.normal(jax.random.key(3), (2, 8, K)),
    }
    loss = scanned_base if stacked else looped

    def step(dot, adapters, base, x):
        def of(adapters, base, x):
            return loss(base, adapters, x, dot)

        of = jax.checkpoint(of) if remat else of
        return jax.value_and_grad(of)(adapters, base, x)

    f = transformed(functools.partial(step, matmul))
    by_base = [r for r in f.report(adapters, base, x).rows if r.status == "fp8"]
    assert all("stored in FP8" in row.reason for row in by_base)
    runs = dict.fromkeys(("fprop", "recompute", "dgrad", "wgrad"), 0)
    for row in by_base:
        runs[row.role] += row.count
    # The first layer's input has no gradient, which a scan does not tell.
    expected = {"fprop": 2, "dgrad": 1 + stacked, "wgrad": 0}
    assert {role: runs[role] for role in expected} == expected
    assert bool(runs["recompute"]) == remat
    chex.assert_trees_all_equal(
        f(adapters, base, x),
        jax.jit(functools.partial(step, by_codes))(adapters, base, x),
    )


def test_frozen_base_in_tiles_of_another_kind_is_an_array_in_a_step(x):
    base = weight(0, K, K, spec=fp8jax.QuantSpec(tile=(128, 64), scale="fp32"))

    def step(adapter, base, x):
        def loss(adapter):
            x_1 = jnp.tanh(x @ base + x @ adapter)
            return jnp.mean((x_1 @ base + x_1 @ adapter) ** 2)

        return jax.value_and_grad(loss)(adapter)

    adapter = jnp.zeros((K, K))
    f = transformed(step)
    assert f.report(adapter, base, x).fraction == 1
    plain, _ = step(adapter, base.dequantize(), x)
    # Rounded once more, to new codes: half a step of three bits of mantissa each.
    np.testing.assert_allclose(f(adapter, base, x)[0], plain, rtol=2**-4)


def test_sharded_weights(x):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("x",))
    q = weight(0, K, 8 * 128)
    f = transformed(lambda w, x: x @ w)
    columns = jax.NamedSharding(mesh, jax.P(None, "x"))
    sharded = jax.device_put(q, columns)
    # The same codes, which XLA may add in another order: some ulps.
    chex.assert_trees_all_close(f(sharded, x), f(q, x), rtol=1e-6, atol=1e-6)
    assert "all-gather" not in f.lower(sharded, x).compile().as_text()


def test_sharded_weights_run_in_the_gpu_kernels_of_each_device(x, monkeypatch):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("x",))
    q = jax.device_put(weight(0, K, 8 * 128), jax.NamedSharding(mesh, jax.P(None, "x")))
    f = transformed(lambda w, x: x @ w)
    # Of no other test's sizes: what JAX traced before has the CPU's implementation.
    x = x[:16]
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    text = str(f.trace(q, x).jaxpr)
    assert "custom_partitioning[" in text
    if _compat.JAX_VERSION >= (0, 11):
        assert {row.kernel for row in f.report(q, x).rows} == {"mosaic_gpu"}
        assert "mosaic" in text


def test_linen_model_of_flax_s_own_layers(x):
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(N, name="up", use_bias=False)(x))
            return nn.Dense(K, name="down")(x)

    model = MLP()
    variables = model.init(jax.random.key(0), x)
    params = fp8jax_params(variables)
    f = transformed(model.apply)
    report = f.report(params, x)
    assert [row.path for row in report.rows] == [
        "params/up/kernel",
        "params/down/kernel",
    ]
    assert only_static(report)
    expected = product(
        nn.relu(product(x, params["params"]["up"]["kernel"])),
        params["params"]["down"]["kernel"],
    )
    # As above.
    chex.assert_trees_all_close(f(params, x), expected, rtol=1e-6, atol=1e-6)


def fp8jax_params(tree):
    return jax.tree.map(lambda w: fp8jax.quantize(w, SPEC) if w.ndim > 1 else w, tree)


def test_nnx_module_keeps_its_qtensor(x):
    layer = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    q = weight(0, K, N)
    nnx.update(layer, {"kernel": q})
    f = transformed(lambda layer, x: layer(x))
    assert only_static(f.report(layer, x))
    chex.assert_trees_all_equal(f(layer, x), product(x, q))
    chex.assert_trees_all_equal(layer.kernel.get_value(), q)
