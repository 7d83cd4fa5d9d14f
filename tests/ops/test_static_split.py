"""Weights stored in FP8, sharded: split as the plain product would be."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _dispatch, ops

K, HIDDEN = 512, 1024
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


def normal(seed, *shape, size=1.0):
    return size * jax.random.normal(jax.random.key(seed), shape)


X = normal(0, 4, 16, K)
SCALE = 1 + 0.1 * normal(4, K)
GATE, UP, DOWN = VALUES = [
    normal(i, *s, size=s[0] ** -0.5)
    for i, s in enumerate([(K, HIDDEN), (K, HIDDEN), (HIDDEN, K)], start=1)
]


def dense(x, w):
    return ops.static_weight_dot("test", x, w, out_dtype=jnp.float32)


def normalized(x, scale, *w):
    how = {"epsilon": 1e-6, "out_dtype": jnp.float32}
    return ops.static_weight_rms_norm("test", x, scale, *w, **how)


def gated(x, *w):
    return ops.static_weight_swiglu("test", x, *w, out_dtype=jnp.float32)


def codes(*weights):
    return [fp8jax.quantize(w, SPEC) for w in weights]


def plain_gated(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def plain_normalized(x, scale, *w):
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * scale
    return tuple(h @ v for v in w)


ROWS, COLUMNS, HALVES = P("a"), P(None, "b"), P("b")
CASES = {
    "rows": (dense, jnp.matmul, [X, UP], [ROWS, P()]),
    "columns": (dense, jnp.matmul, [X, UP], [ROWS, COLUMNS]),
    "contraction": (dense, jnp.matmul, [X, UP], [P("a", None, "b"), HALVES]),
    "tokens": (dense, jnp.matmul, [X, UP], [P("a", "b"), P()]),
    "gated": (gated, plain_gated, [X, *VALUES], [ROWS, COLUMNS, COLUMNS, HALVES]),
    "normalized": (
        normalized,
        plain_normalized,
        [X, SCALE, GATE, UP],
        [ROWS, P(), COLUMNS, COLUMNS],
    ),
}


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def stored(arrays):
    return [v if v.ndim != 2 else fp8jax.quantize(v, SPEC) for v in arrays]


def put(mesh, trees, specs):
    return [
        jax.tree.map(lambda v, s=s: jax.device_put(v, NamedSharding(mesh, s)), tree)
        for tree, s in zip(trees, specs, strict=True)
    ]


def collectives(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return collections.Counter(re.findall(rf" ({names})(?:-start)?\(", str(text)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_collective_is_added_and_the_numbers_are_those_of_one_device(mesh, case):
    op, plain, arrays, specs = case
    placed = put(mesh, stored(arrays), specs)
    found = collectives(op, *placed)
    assert found <= collectives(plain, *put(mesh, arrays, specs))
    got, wanted = jax.jit(op)(*placed), op(*stored(arrays))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(a, b)


def close(got, wanted):
    # Each sum has 512 terms, or twice that, of magnitudes that add up to 10 at most.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1024 * 2**-24 * 10)


def test_an_activation_in_codes_is_split_as_an_array_would_be(mesh):
    q, w = fp8jax.quantize(X.reshape(-1, K)), fp8jax.quantize(UP, SPEC)
    placed = put(mesh, [q, w], [P("a", "b"), HALVES])
    assert collectives(dense, *placed) == {"all-reduce": 1}
    close(jax.jit(dense)(*placed), dense(q, w))


def test_tiles_are_never_cut(mesh):
    w = fp8jax.quantize(UP[:, :256], SPEC)  # Two blocks for four devices.
    x, w = put(mesh, [X, w], [ROWS, P()])
    sharded = jax.device_put(w.data, NamedSharding(mesh, COLUMNS))
    y = jax.jit(dense)(x, fp8jax.QTensor(sharded, w.scale, w.tile))
    close(y, dense(X, fp8jax.quantize(UP[:, :256], SPEC)))


def test_mapped_weights_are_split_too(mesh):
    w = fp8jax.quantize(jnp.stack([GATE, UP]), SPEC)
    x, sharded = put(mesh, [X, w], [ROWS, P(None, None, "b")])
    mapped = jax.vmap(dense, (None, 0))
    assert not collectives(mapped, x, sharded)
    close(jax.jit(mapped)(x, sharded), mapped(X, w))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)
@pytest.mark.parametrize("name", ["columns", "gated", "normalized"])
def test_no_kernel_is_where_xla_would_gather_for_it(mesh, name, monkeypatch):
    op, _, arrays, specs = CASES[name]
    placed = put(mesh, stored(arrays), specs)
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    text = jax.jit(op).trace(*placed).lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" in text
    assert "mosaic_gpu" not in text


def test_gated_gradient_is_that_of_three_products_by_the_codes():
    """And not of their values: `fake_quantize` would give another."""
    x, *weights = stored([X, *VALUES])

    def by_hand(x):
        gate, up = (dense(x, w) for w in weights[:2])
        return dense(jax.nn.silu(gate) * up, weights[2])

    got, expected = (
        jax.grad(lambda x: jnp.sum(jnp.sin(fn(x))))(x)  # noqa: B023
        for fn in (lambda x: gated(x, *weights), by_hand)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_input_s_gradient_is_that_of_one_device_and_codes_have_none(mesh):
    arrays = stored([X, UP])
    x, w = put(mesh, arrays, [ROWS, COLUMNS])

    def gradient(x, w):
        return jax.grad(lambda x: jnp.sum(dense(x, w) ** 2))(x)

    close(jax.jit(gradient)(x, w), gradient(*arrays))
    with pytest.raises(TypeError, match="test with a QTensor has no gradient of that"):
        jax.grad(lambda w: dense(x, w).sum())(w)
