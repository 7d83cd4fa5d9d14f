"""Routing is DeepSeek-V3's, and tokens go to their experts and back unharmed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import ops
from fp8jax.testing import assert_same_bits

TOKENS, EXPERTS = 64, 16
COUNTS = [
    {"top_k": 4, "num_groups": 4, "top_groups": 2},
    {"top_k": 8, "num_groups": 8, "top_groups": 4, "scale": 2.5},
    {"top_k": 2, "num_groups": 1, "top_groups": 1, "normalize": False},
    {"top_k": 3, "num_groups": 16, "top_groups": 5},
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def oracle(logits, bias, top_k, num_groups=1, top_groups=1, scale=1.0, normalize=True):
    """The report's equations, token by token, in float64."""
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    experts, weights = [], []
    for s in scores:
        biased = s + np.asarray(bias, np.float64)
        by_group = biased.reshape(num_groups, -1)
        best = np.sort(by_group)[:, -2:].sum(axis=1)
        allowed = np.argsort(-best, kind="stable")[:top_groups]
        size = by_group.shape[1]
        candidates = [e for e in range(len(s)) if e // size in allowed]
        taken = sorted(candidates, key=lambda e: (-biased[e], e))[:top_k]
        w = s[taken]
        experts.append(taken)
        weights.append(scale * (w / w.sum() if normalize else w))
    return np.array(experts), np.array(weights)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_routing_is_the_report_s_in_float64(counts):
    logits, bias = normal(0, TOKENS, EXPERTS), 0.2 * normal(1, EXPERTS)
    routing = jax.jit(lambda a, b: ops.route(a, b, **counts))(logits, bias)
    experts, weights = oracle(logits, bias, **counts)
    np.testing.assert_array_equal(routing.experts, experts)
    assert routing.weights.dtype == jnp.float32
    # A sigmoid, a sum of eight at most and two products: some float32 ulps.
    np.testing.assert_allclose(routing.weights, weights, rtol=32 * 2**-24)


@pytest.mark.interop
@pytest.mark.parametrize("counts", COUNTS[:3], ids=str)
def test_routing_is_that_of_transformers(counts):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip(
        "transformers.models.deepseek_v3.modeling_deepseek_v3"
    )
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=counts["top_k"],
        n_group=counts["num_groups"],
        topk_group=counts["top_groups"],
        routed_scaling_factor=counts.get("scale", 1.0),
        norm_topk_prob=counts.get("normalize", True),
    )
    router = modeling.DeepseekV3TopkRouter(config)
    x, kernel, bias = normal(2, TOKENS, 32), normal(3, EXPERTS, 32), normal(4, EXPERTS)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(np.asarray(kernel)))
        router.e_score_correction_bias.copy_(torch.tensor(np.asarray(bias)))
        logits, weights, experts = router(torch.tensor(np.asarray(x)))
    ours = ops.route(jnp.asarray(logits.numpy()), bias, **counts)
    # Theirs come in any order.
    order, their_order = np.argsort(ours.experts), np.argsort(experts.numpy())
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(ours.experts), order, 1),
        np.take_along_axis(experts.numpy(), their_order, 1),
    )
    # As in float64 above: their float32 and ours.
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(ours.weights), order, 1),
        np.take_along_axis(weights.numpy(), their_order, 1),
        rtol=32 * 2**-24,
    )


def test_bias_chooses_but_does_not_weigh_and_has_no_gradient():
    logits, zeros = normal(0, TOKENS, EXPERTS), jnp.zeros(EXPERTS)
    favoured = zeros.at[5].set(2.0)  # More than any sigmoid.
    counts = {"top_k": 4, "normalize": False}
    routing = ops.route(logits, favoured, **counts)
    assert np.all(routing.experts[:, 0] == 5)
    np.testing.assert_array_equal(routing.weights[:, 0], jax.nn.sigmoid(logits[:, 5]))
    gradient = jax.grad(
        lambda logits, bias: ops.route(logits, bias, **counts).weights.sum(), (0, 1)
    )
    of_logits, of_bias = gradient(logits, favoured)
    assert not np.any(of_bias)
    taken = np.zeros((TOKENS, EXPERTS), bool)
    np.put_along_axis(taken, np.asarray(routing.experts), True, 1)
    np.testing.assert_array_equal(np.asarray(of_logits) != 0, taken)


def test_gradient_of_weights_is_the_equation_s_in_float64():
    logits, bias = normal(0, 3, EXPERTS), jnp.zeros(EXPERTS)
    counts = {"top_k": 4, "num_groups": 4, "top_groups": 2, "scale": 2.5}
    mix = np.asarray(normal(1, 3, 4), np.float64)
    ours = jax.grad(
        lambda x: (ops.route(x, bias, **counts).weights * mix.astype(np.float32)).sum()
    )(logits)
    step, found = 1e-6, np.zeros_like(ours, np.float64)
    for i, j in itertools.product(range(3), range(EXPERTS)):
        moved = np.zeros_like(found)
        moved[i, j] = step
        up, down = (
            (oracle(np.asarray(logits, np.float64) + d, bias, **counts)[1] * mix).sum()
            for d in (moved, -moved)
        )
        found[i, j] = (up - down) / (2 * step)
    # Differences of float64 over 2e-6 are good to 1e-10 of their terms, whose second
    # order is less: float32's 2^-24 in some ten steps remain.
    np.testing.assert_allclose(ours, found, atol=1e-5)


def test_equal_scores_go_to_the_lower_number():
    routing = ops.route(
        jnp.zeros((2, 8)), jnp.zeros(8), top_k=3, num_groups=4, top_groups=2
    )
    np.testing.assert_array_equal(routing.experts, [[0, 1, 2]] * 2)


def test_token_of_nan_and_one_of_the_least_scores_are_routed_to_experts():
    logits = normal(0, 4, EXPERTS).at[1].set(jnp.nan).at[2].set(-200.0)
    routing = ops.route(logits, jnp.zeros(EXPERTS), top_k=4, num_groups=4, top_groups=2)
    assert np.all((routing.experts >= 0) & (routing.experts < EXPERTS))
    assert np.all(np.diff(np.sort(routing.experts)) > 0)
    assert np.all(np.isnan(routing.weights[1]))
    assert np.all(np.isfinite(np.delete(routing.weights, 1, axis=0)))


NANS = np.float32(np.nan), np.copysign(np.float32(np.nan), np.float32(-1))


@pytest.mark.parametrize("nan", NANS, ids=["+nan", "-nan"])
@pytest.mark.parametrize("expert", [0, 7, 15])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_one_nan_makes_all_weights_of_its_token_nan_and_no_other_s(counts, expert, nan):
    # By its sign an order puts it first or last.
    clean, bias = normal(0, TOKENS, EXPERTS), 0.2 * normal(1, EXPERTS)
    logits = clean.at[5, expert].set(nan)
    mix = normal(2, TOKENS, counts["top_k"])

    @jax.jit
    def route_and_gradient(logits):
        def loss(logits):
            routing = ops.route(logits, bias, **counts)
            return (routing.weights * mix).sum(), routing

        gradient, routing = jax.grad(loss, has_aux=True)(logits)
        return routing, gradient

    routing, gradient = route_and_gradient(logits)
    experts, weights = oracle(clean, bias, **counts)
    others = np.delete(np.arange(TOKENS), 5)
    np.testing.assert_array_equal(routing.experts[others], experts[others])
    # As in the first test.
    np.testing.assert_allclose(
        routing.weights[others], weights[others], rtol=32 * 2**-24
    )
    assert np.all(np.isnan(routing.weights[5]))
    assert len(set(np.asarray(routing.experts[5]))) == counts["top_k"]
    assert np.all((routing.experts >= 0) & (routing.experts < EXPERTS))
    load = ops.dispatch(routing.experts, EXPERTS).load
    assert load.sum() == TOKENS * counts["top_k"]
    assert np.isnan(gradient[5, expert])
    _, expected = route_and_gradient(clean)
    np.testing.assert_array_equal(gradient[others], expected[others])


def test_a_nan_in_the_bias_leaves_no_token_s_experts_known():
    bias = jnp.zeros(EXPERTS).at[3].set(jnp.nan)
    routing = ops.route(normal(0, TOKENS, EXPERTS), bias, top_k=4)
    assert np.all(np.isnan(routing.weights))


def test_infinite_logits_are_scores_of_one_and_of_zero():
    logits = normal(0, TOKENS, EXPERTS).at[5, 3].set(jnp.inf).at[6, 4].set(-jnp.inf)
    bias = jnp.zeros(EXPERTS)
    routing, gradient = (
        f(lambda x: ops.route(x, bias, top_k=4))(logits)
        for f in (lambda f: f, lambda f: jax.grad(lambda x: f(x).weights.std()))
    )
    experts, weights = oracle(np.clip(logits, -500, 500), bias, top_k=4)
    np.testing.assert_array_equal(routing.experts, experts)
    # As in the first test.
    np.testing.assert_allclose(routing.weights, weights, rtol=32 * 2**-24)
    assert routing.experts[5, 0] == 3
    assert np.all(np.isfinite(gradient))


def test_infinite_biases_bar_and_force_experts():
    bias = jnp.full(EXPERTS, -jnp.inf).at[jnp.array([1, 2, 3])].set(0.0)
    bias = bias.at[8].set(jnp.inf)
    # Group 2 has one forced expert, and three that are barred.
    logits = normal(0, TOKENS, EXPERTS)
    routing = ops.route(logits, bias, top_k=4, num_groups=4, top_groups=2)
    np.testing.assert_array_equal(np.sort(routing.experts), [[1, 2, 3, 8]] * TOKENS)
    assert np.all(np.isfinite(routing.weights))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_groups": 3}, "num_groups=3"),
        ({"top_groups": 5}, "top_groups=5"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 9}, "top_k=9"),
        ({"logits": jnp.zeros((2, 16), jnp.bfloat16)}, r"logits bfloat16\[2, 16\]"),
        ({"bias": jnp.zeros(15)}, r"bias.shape=\(15,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_counts_are_named(change, match):
    good = {
        "logits": jnp.zeros((2, 16)),
        "bias": jnp.zeros(16),
        "top_k": 4,
        "num_groups": 4,
        "top_groups": 2,
    }
    with pytest.raises(ValueError, match=f"^route takes .*{match}"):
        ops.route(**{**good, **change})


def test_bias_moves_against_the_load_by_the_rate():
    bias, load = jnp.array([[0.5, 0.5, 0.5, 0.5]]), jnp.array([[1, 4, 2, 1]])
    moved = ops.balanced_bias(bias, load, 0.25)
    np.testing.assert_array_equal(moved, [[0.75, 0.25, 0.5, 0.75]])
    with pytest.raises(ValueError, match="balanced_bias takes"):
        ops.balanced_bias(bias, load[0], 0.25)


def test_balancing_evens_the_load_of_skewed_scores():
    logits = normal(0, 512, EXPERTS) + jnp.linspace(-2, 2, EXPERTS)
    bias = jnp.zeros(EXPERTS)

    @jax.jit
    def step(bias):
        experts = ops.route(logits, bias, top_k=2).experts
        sizes = ops.dispatch(experts, EXPERTS).group_sizes
        return ops.balanced_bias(bias, sizes, 0.01), sizes

    _, first = step(bias)
    for _ in range(100):
        bias, last = step(bias)
    assert np.max(first) > 2 * 64  # 64 were even.
    assert np.max(last) < 77


# Few shapes, as each is compiled.
slots = st.sampled_from([(1, 1), (7, 2), (20, 4)]).flatmap(
    lambda shape: st.lists(
        st.permutations(range(6)).map(lambda p: p[: shape[1]]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@settings(max_examples=25, deadline=None)
@given(slots)
def test_permutation_keeps_every_token_and_its_order(experts):
    experts = jnp.asarray(experts, jnp.int32)
    tokens, top_k = experts.shape
    to = ops.dispatch(experts, 6)
    flat = np.asarray(experts).ravel()
    np.testing.assert_array_equal(to.group_sizes, np.bincount(flat, minlength=6))
    np.testing.assert_array_equal(to.slots, np.argsort(flat, kind="stable"))
    x, weights = normal(0, tokens, 5), normal(1, tokens, top_k)
    rows = ops.permute(x, to)
    np.testing.assert_array_equal(rows, np.asarray(x)[np.asarray(to.slots) // top_k])
    combined = ops.unpermute(rows, weights, to)
    # Float32 sums of a few products of order one: some 2^-24 for each.
    np.testing.assert_allclose(
        combined, x * weights.sum(1, keepdims=True), rtol=1e-5, atol=1e-5
    )


def test_gradients_of_gathers_are_those_of_indexing():
    experts = jax.lax.top_k(normal(0, 9, 6), 3)[1]
    to = ops.dispatch(experts, 6)
    x, weights, mix = normal(1, 9, 5), normal(2, 9, 3), normal(3, 27, 5)

    def ours(x, weights):
        return ops.unpermute(jnp.tanh(ops.permute(x, to) * mix), weights, to)

    def indexed(x, weights):
        y = jnp.tanh(x[to.slots // 3] * mix)
        return (y[to.rows] * weights[:, :, None]).sum(1)

    for order in (1, 2):
        a, e = (_derivative(f, order)(x, weights) for f in (ours, indexed))
        for left, right in zip(a, e, strict=True):
            # Float32 sums of three products of order one, in two orders: some 2^-23 for
            # each.
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def _derivative(f, order):
    def loss(x, weights):
        return (f(x, weights) ** 2).sum()

    if order == 2:
        first = jax.grad(loss, (0, 1))

        def loss(x, weights):
            return sum((g**2).sum() for g in first(x, weights))

    return jax.grad(loss, (0, 1))


def test_gradients_hold_no_scatter_that_adds():
    to = ops.dispatch(jax.lax.top_k(normal(0, 9, 6), 3)[1], 6)

    def loss(x, weights):
        return ops.unpermute(ops.permute(x, to), weights, to).sum()

    jaxpr = str(
        jax.make_jaxpr(jax.grad(loss, (0, 1)))(normal(1, 9, 5), normal(2, 9, 3))
    )
    assert "gather" in jaxpr
    assert "scatter" not in jaxpr


def test_rows_in_bfloat16_are_summed_in_float32():
    to = ops.dispatch(jnp.array([[0, 1, 2]]), 3)
    y = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    ones = jnp.ones((1, 3))
    assert_same_bits(ops.unpermute(y, ones, to), jnp.full((1, 1), 258, jnp.bfloat16))
