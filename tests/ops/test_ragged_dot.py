"""`ragged_dot` is `dot_general` of each group, whatever the sizes of the groups."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fp8jax
from fp8jax import numerics, ops, recipes
from fp8jax.testing import assert_same_bits

M, G, K, N = 300, 5, 160, 136
RECIPES = {
    "deepseek_v3": recipes.deepseek_v3(),
    "kept in FP8": recipes.deepseek_v3(residual="fp8"),
    "blocked wgrad": recipes.blocked_wgrad(),
    "bf16 wgrad": recipes.bf16_wgrad(),
}
SIZES = [
    [60, 60, 60, 60, 60],
    [300, 0, 0, 0, 0],
    [0, 0, 0, 0, 300],
    [0, 7, 0, 130, 0],
    [1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0],
    [128, 129, 0, 1, 42],
]

pytestmark = pytest.mark.usefixtures("one_device")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.cache
def exact_arrays():
    """x, w and dout whose codes, products and sums are all exact.

    Integers below 16 are E4M3 codes at any power of two, here of each row and block;
    sums of at most 300 products below 2^14 are float32 numbers in whatever order.
    """
    rng = np.random.default_rng(0)

    def integers(*shape):
        return rng.integers(-15, 16, shape) * 1.0

    rows = 2.0 ** rng.integers(0, 4, (2, M, 1))
    blocks = np.kron(2.0 ** rng.integers(0, 4, (G, 2, 2)), np.ones((1, 128, 128)))
    x, dout = rows[0] * integers(M, K), rows[1] * integers(M, N)
    w = blocks[:, :K, :N] * integers(G, K, N)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, w, dout))


def value_and_gradients(fn, x, w, dout):
    y, vjp = jax.vjp(fn, x, w)
    return y, *vjp(dout)


@functools.cache
def ragged(recipe):
    @jax.jit
    def run(x, w, dout, sizes):
        def product(x, w):
            return fp8jax.ragged_dot(x, w, sizes, recipe=recipe)

        return value_and_gradients(product, x, w, dout)

    return run


@functools.cache
def loop(recipe):
    """Each group by itself through `dot_general`, its rows moved to the front."""
    numbers = (((1,), (0,)), ((), ()))
    dense = functools.partial(
        fp8jax.dot_general, dimension_numbers=numbers, recipe=recipe
    )

    @jax.jit
    def one(x, w, dout, start, size):
        def front(a):
            return jnp.where(jnp.arange(M)[:, None] < size, jnp.roll(a, -start, 0), 0)

        y, dx, dw = value_and_gradients(dense, front(x), w, front(dout))
        return jnp.roll(y, start, 0), jnp.roll(dx, start, 0), dw

    def run(x, w, dout, sizes):
        starts = np.cumsum(sizes) - sizes
        parts = [
            one(x, w[e], dout, s, n)
            for e, (s, n) in enumerate(zip(starts, sizes, strict=True))
        ]
        ys, dxs, dws = zip(*parts, strict=True)
        # The rows of the other groups are zero.
        return sum(ys), sum(dxs), jnp.stack(dws)

    return run


group_sizes = st.lists(st.integers(0, M), min_size=G, max_size=G).map(
    lambda cuts: np.diff([0, *sorted(cuts)]).tolist()
)


def with_examples(test):
    for sizes in SIZES:
        test = example(sizes=sizes)(test)
    return test


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@settings(max_examples=10, deadline=None)
@given(sizes=group_sizes)
@with_examples
def test_every_bit_is_that_of_a_loop_of_dense_products(recipe, sizes):
    arrays = exact_arrays()
    ours = ragged(recipe)(*arrays, jnp.asarray(sizes, jnp.int32))
    for a, e in zip(ours, loop(recipe)(*arrays, np.asarray(sizes)), strict=True):
        # Not `assert_same_bits`: a sum over groups may turn -0 into 0.
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_of_no_group_and_weights_of_no_row_have_exact_zeros(sizes):
    x, w, dout = normal(0, M, K), normal(1, G, K, N), normal(2, M, N)
    x, dout = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dout))
    for recipe in RECIPES.values():
        y, dx, dw = ragged(recipe)(x, w, dout, jnp.asarray(sizes, jnp.int32))
        assert not np.any(y[sum(sizes) :])
        if recipe.dgrad is not None:
            assert not np.any(dx[sum(sizes) :])
        if recipe.wgrad is None:
            continue  # XLA's own product may read what is left over.
        for e, size in enumerate(sizes):
            assert np.all(np.isfinite(dw[e]))
            assert bool(np.any(dw[e])) == (size > 0)


@pytest.mark.parametrize("where", ["x", "w"])
def test_nan_in_one_group_stays_in_it(where):
    arrays = {"x": normal(0, M, K), "w": normal(1, G, K, N), "dout": normal(2, M, N)}
    sizes = jnp.array([50, 70, 40, 0, 100], jnp.int32)
    run = ragged(recipes.deepseek_v3())
    clean = run(*arrays.values(), sizes)
    place = (130, 3) if where == "x" else (2, 3, 4)  # Of group 2, rows 120 to 159.
    arrays[where] = arrays[where].at[place].set(jnp.nan)
    y, dx, dw = run(*arrays.values(), sizes)
    is_bad = np.isnan(y).any(1)
    assert is_bad.any()
    assert not is_bad[:120].any()
    assert not is_bad[160:].any()
    assert np.isnan(dw[2] if where == "x" else dx[120:160]).any()
    for a, e, own in zip(
        (y, dx, dw),
        clean,
        (slice(120, 160), slice(120, 160), slice(2, 3)),
        strict=True,
    ):
        others = np.ones(len(a), bool)
        others[own] = False
        assert_same_bits(a[others], e[others])


@pytest.mark.parametrize("recipe", list(RECIPES.values())[:3], ids=list(RECIPES)[:3])
def test_products_are_near_those_of_float64(recipe):
    sizes = np.array([100, 0, 30, 70, 80])
    x, w, dout = normal(0, M, K), normal(1, G, K, N), normal(2, M, N)
    ours = ragged(recipe)(x, w, dout, jnp.asarray(sizes, jnp.int32))
    starts = np.cumsum(sizes) - sizes
    x, w, dout = (np.asarray(a, np.float64) for a in (x, w, dout))
    y, dx, dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros((G, K, N))
    for e, (s, n) in enumerate(zip(starts, sizes, strict=True)):
        rows = slice(s, s + n)
        y[rows], dx[rows] = x[rows] @ w[e], dout[rows] @ w[e].T
        dw[e] = x[rows].T @ dout[rows]
    for a, e in zip(ours, (y, dx, dw), strict=True):
        # A code is off by 2^-4 of itself at most: two of them in a product, which are
        # unrelated from one to the next, leave 2^-3 of its size, 18 dB.
        assert numerics.sqnr_db(a, jnp.asarray(e, jnp.float32)) > 18


def test_signature_is_jax_s_and_two_arguments():
    theirs = list(inspect.signature(jax.lax.ragged_dot).parameters.values())
    ours = list(inspect.signature(fp8jax.ragged_dot).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for a, e in zip(ours, theirs, strict=False):
        assert (a.kind, a.default) == (e.kind, e.default)
    extra = ours[len(theirs) :]
    assert [p.name for p in extra] == ["recipe", "implementation"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in extra)


def test_bf16_recipe_is_jax_s():
    x, w = normal(0, 8, K, dtype=jnp.bfloat16), normal(1, G, K, N, dtype=jnp.bfloat16)
    sizes = jnp.ones(G, jnp.int32)

    def jaxpr(fn):
        run = jax.grad(lambda x, w: fn(x, w, sizes).astype(jnp.float32).sum(), (0, 1))
        return str(jax.make_jaxpr(run)(x, w))

    off = functools.partial(fp8jax.ragged_dot, recipe=recipes.bf16())
    assert jaxpr(off) == jaxpr(jax.lax.ragged_dot)
    assert jaxpr(fp8jax.ragged_dot) != jaxpr(jax.lax.ragged_dot)


def test_dtypes_are_those_of_jax_s():
    dtype = jnp.bfloat16
    x, w = normal(0, 8, K, dtype=dtype), normal(1, G, K, N, dtype=dtype)
    for preferred in (None, jnp.float32):
        dout = jnp.ones((8, N), preferred or dtype)
        for sizes in (jnp.ones(G, jnp.int32), jnp.ones(G, jnp.uint8)):
            found, expected = (
                jax.eval_shape(
                    functools.partial(_with_dtype, f, preferred, sizes), x, w, dout
                )
                for f in (fp8jax.ragged_dot, jax.lax.ragged_dot)
            )
            assert found == expected


def _with_dtype(dot, dtype, sizes, x, w, dout):
    run = functools.partial(dot, group_sizes=sizes, preferred_element_type=dtype)
    return value_and_gradients(run, x, w, dout)


def test_sizes_are_data_in_scan_and_vmap_and_remat():
    x, w = normal(0, 48, 128), normal(1, G, 128, 40)
    sizes = jnp.array([[48, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 16, 0, 16, 16]])

    @jax.jit
    def gradients(s):
        def loss(x, w):
            return (fp8jax.ragged_dot(x, w, s) ** 2).sum()

        return jax.grad(jax.checkpoint(loss), (0, 1))(x, w)

    each = [gradients(s) for s in sizes]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *each)
    _, scanned = jax.lax.scan(lambda c, s: (c, gradients(s)), 0, sizes)
    mapped = jax.vmap(gradients)(sizes)
    for found in (scanned, mapped):
        for a, e in zip(found, expected, strict=True):
            # XLA may add in another order, and a code at a tie then moves.
            assert numerics.sqnr_db(a, e) > 45
    plain = jax.grad(lambda x: (fp8jax.ragged_dot(x, w, sizes[2]) ** 2).sum())(x)
    assert numerics.sqnr_db(plain, each[2][0]) > 45


def test_policies_know_codes_and_products_by_name():
    x, w, sizes = normal(0, 48, K), normal(1, G, K, N), jnp.full(G, 9, jnp.int32)
    recipe = recipes.deepseek_v3(residual="fp8")
    policy = fp8jax.checkpoint_policies.products_and_codes_saveable

    def quantizations(policy):
        def block(x, w):
            return jnp.sin(fp8jax.ragged_dot(x, w, sizes, recipe=recipe)).sum()

        run = jax.grad(jax.checkpoint(block, policy=policy), (0, 1))
        text = str(jax.make_jaxpr(run)(x, w))
        return text.count("name=fp8jax::quantize"), text.count("name=fp8jax::grouped")

    nothing_again = quantizations(policy)
    assert nothing_again == (3, 3)  # x, w and dout, both ways each
    assert quantizations(None) == (5, 4)


def test_what_is_not_supported_is_named():
    x, w, sizes = normal(0, 8, K), normal(1, G, K, N), jnp.ones(G, jnp.int32)
    run = fp8jax.ragged_dot
    for bad in (
        (x[0], w, sizes),
        (x, w[0], sizes),
        (x[:, 1:], w, sizes),
        (x, w, sizes[1:]),
        (x, w, sizes.astype(jnp.float32)),
    ):
        with pytest.raises(ValueError, match=r"ragged_dot takes rows \[m, k\], a weig"):
            run(*bad)
    with pytest.raises(ValueError, match=r"ragged_dot takes bfloat16.*lhs.dtype=int32"):
        run(x.astype(jnp.int32), w, sizes)
    with pytest.raises(ValueError, match="ragged_dot takes preferred_element_type"):
        run(x, w, sizes, preferred_element_type=jnp.int32)
    with pytest.raises(ValueError, match="ragged_dot takes a Recipe or None"):
        run(x, w, sizes, recipe="fp8")
    with pytest.raises(NotImplementedError, match=r"ragged_dot in FP8.*group_offset="):
        run(x, w, sizes, group_offset=jnp.int32(1))
    with pytest.raises(NotImplementedError, match=r"ragged_dot in FP8.*out_sharding="):
        run(x, w, sizes, out_sharding=jax.sharding.PartitionSpec())
    gradient = jax.grad(lambda x: run(x, w, sizes).sum())
    with pytest.raises(TypeError, match="ragged_dot in FP8 has a gradient, but no"):
        jax.jvp(gradient, (x,), (x,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: run(x, w, sizes), (x,), (x,))


def expert_arrays(dtype):
    hidden = 264
    shapes = (M, K), (G, K, hidden), (G, K, hidden), (G, hidden, N)
    x, *weights = (normal(i, *shape) for i, shape in enumerate(shapes))
    weights = (w * w.shape[1] ** -0.5 for w in weights)
    return [a.astype(dtype) for a in (x, *weights)]


@functools.partial(jax.jit, static_argnums=0)
def mlp_gradients(fn, sizes, *inputs):
    y, vjp = jax.vjp(lambda *a: fn(*a, sizes), *inputs)
    return y, vjp(normal(9, *y.shape, dtype=y.dtype))


def three_products(x, w_gate, w_up, w_down, sizes, dot):
    gate, up = dot(x, w_gate, sizes), dot(x, w_up, sizes)
    h = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return dot(h.astype(x.dtype), w_down, sizes)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (recipes.deepseek_v3(), jnp.bfloat16),
        (recipes.deepseek_v3(residual="fp8"), jnp.float32),
    ],
    ids=["bf16", "fp8"],
)
def test_expert_mlp_is_three_products_but_for_codes_at_ties(recipe, dtype):
    inputs, sizes = expert_arrays(dtype), jnp.array([100, 0, 60, 1, 70])
    fused = mlp_gradients(
        functools.partial(ops.expert_mlp, recipe=recipe), sizes, *inputs
    )
    dot = functools.partial(fp8jax.ragged_dot, recipe=recipe)
    unfused = mlp_gradients(functools.partial(three_products, dot=dot), sizes, *inputs)
    exact = mlp_gradients(
        functools.partial(three_products, dot=jax.lax.ragged_dot),
        sizes,
        *(a.astype(jnp.float32) for a in inputs),
    )
    for a, e, r in zip(*map(jax.tree.leaves, (fused, unfused, exact)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        # As `swiglu_mlp` against three `dot_general`.
        assert numerics.sqnr_db(a, e) > 40
        assert numerics.sqnr_db(a, r) > 15
    y, (dx, *dws) = fused
    assert not np.any(y[231:])
    assert not np.any(dx[231:])
    for dw in dws:
        np.testing.assert_array_equal(
            np.any(np.asarray(dw, np.float32), axis=(1, 2)), sizes > 0
        )


def test_expert_mlp_with_a_gemm_out_of_fp8_is_three_products():
    inputs, sizes = expert_arrays(jnp.float32), jnp.array([100, 0, 60, 1, 70])

    def jaxpr(fn):
        return str(jax.make_jaxpr(fn)(*inputs, sizes))

    for recipe in (recipes.bf16(), recipes.bf16_wgrad()):
        dot = functools.partial(fp8jax.ragged_dot, recipe=recipe)
        assert jaxpr(functools.partial(ops.expert_mlp, recipe=recipe)) == jaxpr(
            functools.partial(three_products, dot=dot)
        )
    assert "quantize_swiglu" in jaxpr(ops.expert_mlp)


def test_recomputing_expert_mlp_keeps_its_input_alone_and_has_the_same_bits():
    inputs, sizes = expert_arrays(jnp.bfloat16), jnp.array([100, 0, 60, 1, 70])
    keeping, recomputing = (
        functools.partial(ops.expert_mlp, recipe=recipes.deepseek_v3(residual=residual))
        for residual in ("bf16", "recompute")
    )

    def kept(fn):
        found = jax.eval_shape(
            lambda *a: jax.vjp(lambda *b: fn(*b, sizes), *a)[1], *inputs
        )
        return {(tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(found)}

    hidden = ((M, 264), "bfloat16")
    assert hidden in kept(keeping)
    assert hidden not in kept(recomputing)
    assert_same_bits(
        mlp_gradients(recomputing, sizes, *inputs),
        mlp_gradients(keeping, sizes, *inputs),
    )


def test_bad_input_of_expert_mlp_is_named():
    x, gate, up, down = expert_arrays(jnp.float32)
    sizes = jnp.ones(G, jnp.int32)
    with pytest.raises(ValueError, match=r"expert_mlp takes w_gate and w_up \[experts"):
        ops.expert_mlp(x, gate, up[..., 1:], down, sizes)
    with pytest.raises(ValueError, match=r"expert_mlp takes rows \[m, k\], a weight"):
        ops.expert_mlp(x, gate, up, down, sizes[1:])
    with pytest.raises(TypeError, match="expert_mlp in FP8 has a gradient, but no"):
        jax.jvp(
            jax.grad(lambda x: ops.expert_mlp(x, gate, up, down, sizes).sum()),
            (x,),
            (x,),
        )
