"""Groups in multiples of 128 rows: the numbers of any others, in fewer reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import numerics, ops, recipes
from fp8jax.ops import _moe
from fp8jax.testing import assert_same_bits

M, G, K, HIDDEN, N = 512, 4, 160, 264, 136
SIZES = [
    [128, 0, 256, 128],
    [512, 0, 0, 0],
    [0, 0, 0, 384],
    [0, 128, 0, 0],
    [0, 0, 0, 0],
]
RECIPES = {
    "bf16": (recipes.deepseek_v3(), jnp.bfloat16),
    "fp8": (recipes.deepseek_v3(residual="fp8"), jnp.float32),
    "blocked fp8": (recipes.blocked_wgrad("fp32", "fp8"), jnp.float32),
}

pytestmark = pytest.mark.usefixtures("one_device")
each_recipe = pytest.mark.parametrize(
    ("recipe", "dtype"), RECIPES.values(), ids=RECIPES
)
each_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def arrays(dtype):
    shapes = (M, K), (G, K, HIDDEN), (G, K, HIDDEN), (G, HIDDEN, N)
    x, *weights = (normal(i, *shape) for i, shape in enumerate(shapes))
    weights = (w * w.shape[1] ** -0.5 for w in weights)
    return [a.astype(dtype) for a in (x, *weights)]


@functools.cache
def experts(recipe, aligned):
    """y and gradients of the experts' MLPs."""

    @jax.jit
    def run(sizes, dout, *inputs):
        def mlp(*inputs):
            return ops.expert_mlp(*inputs, sizes, recipe=recipe, aligned=aligned)

        y, vjp = jax.vjp(mlp, *inputs)
        return y, *vjp(dout.astype(y.dtype))

    return run


@each_recipe
@each_sizes
def test_aligned_groups_are_the_others_but_for_codes_at_ties(recipe, dtype, sizes):
    inputs, dout = arrays(dtype), normal(9, M, N)
    end = sum(sizes)
    # What is in no group may hold anything.
    inputs[0] = inputs[0].at[end:].set(jnp.nan)
    dout = dout.at[end:].set(jnp.nan)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    aligned = experts(recipe, True)(group_sizes, dout, *inputs)
    others = experts(recipe, False)(group_sizes, dout, *inputs)
    assert_same_bits(aligned[0], others[0])
    for a, e in zip(aligned[1:], others[1:], strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        # As `swiglu_mlp` against three `dot_general`.
        assert not np.any(e) or numerics.sqnr_db(a, e) > 40
    dx, *dws = aligned[1:]
    assert not np.any(dx[end:])
    for dw in dws:
        is_used = np.any(np.asarray(dw, np.float32), axis=(1, 2))
        np.testing.assert_array_equal(is_used, np.asarray(sizes) > 0)


@each_recipe
def test_aligned_groups_are_a_loop_of_dense_blocks_and_near_float64(recipe, dtype):
    sizes = np.array(SIZES[0])
    x, *weights = arrays(dtype)
    dout = normal(9, M, N, dtype=dtype)
    ours = experts(recipe, True)(jnp.asarray(sizes, jnp.int32), dout, x, *weights)
    y, dx, *dws = (np.zeros(a.shape, np.float32) for a in ours)

    @jax.jit
    def dense(x, dout, *weights):
        run = functools.partial(ops.swiglu_mlp, recipe=recipe)
        value, vjp = jax.vjp(run, x, *weights)
        return value, *vjp(dout)

    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        if sizes[e]:
            mine = dense(x[rows], dout[rows], *(w[e] for w in weights))
            y[rows], dx[rows], *found = mine
            for dw, value in zip(dws, found, strict=True):
                dw[e] = value
    exact = float64_gradients(sizes, x, *weights, dout)
    for a, e, r in zip(ours, (y, dx, *dws), exact, strict=True):
        # XLA adds a chunk in another order in a matrix of another size.
        assert numerics.sqnr_db(a, e) > 40
        # Chains of up to four products, each operand off by up to 2^-4 of itself.
        assert numerics.sqnr_db(a, r) > 15


def float64_gradients(sizes, *inputs):
    """Of the same block, spelled out in NumPy."""
    x, w_gate, w_up, w_down, dout = (np.asarray(a, np.float64) for a in inputs)
    y, dx = np.zeros((len(x), N)), np.zeros_like(x)
    dws = [np.zeros_like(w) for w in (w_gate, w_up, w_down)]
    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        gate, up = x[rows] @ w_gate[e], x[rows] @ w_up[e]
        sigmoid = 1 / (1 + np.exp(-gate))
        h = gate * sigmoid * up
        y[rows] = h @ w_down[e]
        dh = dout[rows] @ w_down[e].T
        dgate, dup = dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid
        dx[rows] = dgate @ w_gate[e].T + dup @ w_up[e].T
        for dw, pair in zip(
            dws, ((x[rows], dgate), (x[rows], dup), (h, dout[rows])), strict=True
        ):
            dw[e] = pair[0].T @ pair[1]
    return [jnp.asarray(a, jnp.float32) for a in (y, dx, *dws)]


def test_nothing_between_the_products_is_written_in_16_bits():
    inputs, sizes = arrays(jnp.bfloat16), jnp.asarray(SIZES[0], jnp.int32)

    def program(aligned):
        run = experts(recipes.deepseek_v3(), aligned)
        return str(jax.make_jaxpr(run)(sizes, normal(9, M, N), *inputs))

    aligned, others = program(True), program(False)
    assert "quantize_swiglu_gradient" in aligned
    assert "quantize_grouped" not in aligned
    assert "quantize_swiglu_gradient" not in others
    assert others.count("name=fp8jax::quantize_grouped") == 5


def test_rows_that_cannot_be_aligned_are_named():
    x, *weights = arrays(jnp.float32)
    sizes = jnp.zeros(G, jnp.int32)
    with pytest.raises(ValueError, match=r"expert_mlp takes aligned.*got 500 rows"):
        ops.expert_mlp(x[:500], *weights, sizes, aligned=True)
    with pytest.raises(ValueError, match="dispatch takes an align of at least 1"):
        ops.dispatch(jnp.zeros((3, 1), jnp.int32), 2, align=0)


EXPERTS = 6


@pytest.mark.parametrize("align", [1, 4, 128])
@pytest.mark.parametrize("case", ["one expert", "random", "single tokens"])
def test_every_expert_begins_at_a_multiple_and_rows_between_are_zero(align, case):
    rng = np.random.default_rng(0)
    chosen = {
        "one expert": [[5]] * 9,
        "random": [rng.permutation(EXPERTS)[:4] for _ in range(20)],
        "single tokens": [[3, 1, 4]],
    }[case]
    chosen = jnp.asarray(chosen, jnp.int32)
    tokens, top_k = chosen.shape
    to = ops.dispatch(chosen, EXPERTS, align=align)
    plain = ops.dispatch(chosen, EXPERTS)
    load = np.bincount(np.ravel(chosen), minlength=EXPERTS)
    sizes = -(-load // align) * align
    np.testing.assert_array_equal(to.load, load)
    np.testing.assert_array_equal(to.group_sizes, sizes)
    count = tokens * top_k
    total = align * numerics.count_group_blocks(count, EXPERTS, align)
    expected = np.full(total, count)
    for e, end in enumerate(np.cumsum(load)):
        start = sizes[:e].sum()
        expected[start : start + load[e]] = np.asarray(plain.slots)[end - load[e] : end]
    np.testing.assert_array_equal(to.slots, expected)
    np.testing.assert_array_equal(
        np.asarray(to.slots)[np.ravel(to.rows)], np.arange(count)
    )
    x, weights, mix = normal(0, tokens, 5), normal(1, tokens, top_k), normal(2, 5)

    @jax.jit
    def run(to):
        def combine(x, weights):
            return ops.unpermute(ops.permute(x, to) * mix, weights, to)

        y, vjp = jax.vjp(combine, x, weights)
        return y, vjp(normal(3, *y.shape))

    for a, e in zip(*map(jax.tree.leaves, (run(to), run(plain))), strict=True):
        # Products of three factors and sums of four, which XLA may order anew.
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)
    empty = expected == count
    assert not np.any(ops.permute(x, to)[empty])
    # And so are the gradients that those rows get, whatever they hold.
    y = jnp.where(empty[:, None], jnp.nan, normal(4, total, 5))
    out, vjp = jax.vjp(lambda y: ops.unpermute(y, weights, to), y)
    assert np.all(np.isfinite(out))
    (dy,) = vjp(jnp.full_like(out, jnp.nan))
    np.testing.assert_array_equal(np.asarray(dy)[empty], 0)


TOKENS, TOP_K = 96, 3


def mixture(x, router, bias, *weights, recipe=None):
    return ops.moe(x, router, bias, *weights, top_k=TOP_K, recipe=recipe)


def mixture_arrays(favoured=()):
    x, *weights = arrays(jnp.float32)
    w_down = normal(8, G, HIDDEN, K) / 16
    bias = jnp.zeros(G).at[jnp.asarray(favoured, jnp.int32)].set(9.0)
    return x[:TOKENS], normal(5, K, G) / 12, bias, *weights[:2], w_down


def mixture_gradients():
    """y, load and gradients of all but the bias; traced anew for each of these."""

    @jax.jit
    def run(x, router, bias, *weights):
        def apply(x, router, *weights):
            return mixture(x, router, bias, *weights)

        y, vjp, load = jax.vjp(apply, x, router, *weights, has_aux=True)
        return y, load, vjp(normal(9, *y.shape))

    return run


@pytest.mark.parametrize("favoured", [(), (1, 2, 3)], ids=str)
def test_mixture_has_the_same_bits_aligned_or_not(favoured, monkeypatch):
    inputs = mixture_arrays(favoured)
    y, load, gradients = mixture_gradients()(*inputs)
    monkeypatch.setattr(_moe, "_FEWEST_ROWS", np.inf)
    others = mixture_gradients()(*inputs)
    assert_same_bits((y, load), others[:2])
    assert load.sum() == TOKENS * TOP_K
    assert (load == 0).sum() == (1 if favoured else 0)
    for a, e in zip(gradients, others[2], strict=True):
        # As in the first test.
        assert numerics.sqnr_db(a, e) > 40
    for dw in gradients[2:]:
        np.testing.assert_array_equal(np.any(dw, axis=(1, 2)), load > 0)


def test_few_rows_and_recipes_with_a_gemm_out_of_fp8_are_not_aligned():
    x, *rest = mixture_arrays()

    def rows(x, recipe=None):
        run = functools.partial(mixture, recipe=recipe)
        shapes = {
            v.aval.shape for e in jax.make_jaxpr(run)(x, *rest).eqns for v in e.outvars
        }
        return {shape[0] for shape in shapes if shape[1:] == (K,)} - {len(x)}

    padded = 128 * (4 + (3 * TOKENS - 4) // 128)
    assert rows(x) == {padded}
    assert rows(x[:42]) == {126}  # Below 32 a expert.
    assert rows(x, recipes.bf16_wgrad()) == {3 * TOKENS}


def test_nan_in_a_token_stays_in_its_own_rows_and_experts():
    x, *rest = mixture_arrays()
    run = mixture_gradients()
    clean, bad = (run(a, *rest) for a in (x, x.at[7, 3].set(jnp.nan)))
    assert np.isnan(bad[0][7]).all()
    assert_same_bits(*(jnp.delete(y, 7, axis=0) for y, *_ in (clean, bad)))
    (dx, *_), (bad_dx, *_) = clean[2], bad[2]
    # Whatever NaN scores choose, no other token's experts change, nor its gradient.
    assert_same_bits(*(jnp.delete(d, 7, axis=0) for d in (dx, bad_dx)))


def test_twenty_runs_have_the_same_bits():
    inputs, run = mixture_arrays(), mixture_gradients()
    first = run(*inputs)
    for _ in range(19):
        assert_same_bits(run(*inputs), first)
