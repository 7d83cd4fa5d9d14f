"""Products of a batch of weights have the bits of each entry's own dense product."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax import recipes
from fp8jax.transform import fp8_transform

EXPERTS, ROWS, D, HIDDEN = 2, 130, 128, 256

pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.1


PARAMS = {
    "gate": normal(0, EXPERTS, D, HIDDEN),
    "up": normal(1, EXPERTS, D, HIDDEN),
    "down": normal(2, EXPERTS, HIDDEN, D),
}
X = normal(3, EXPERTS, ROWS, D)


def gated(params, x):
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def by_einsum(params, x):
    """Capacity mixture of experts: as many rows for each."""
    gate = jnp.einsum("ecd,edf->ecf", x, params["gate"])
    up = jnp.einsum("ecd,edf->ecf", x, params["up"])
    return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, params["down"])


def one_by_one(params, x):
    entries = [jax.tree.map(lambda w, e=e: w[e], (params, x)) for e in range(len(x))]
    return jnp.stack([gated(*entry) for entry in entries])


def in_groups(params, x):
    """As MaxText's experts: rows in two groups, by `egcm,emf->egcf`."""
    x = x.reshape(EXPERTS, 2, ROWS // 2, D)
    gate, up = (
        jnp.einsum("egcm,emf->egcf", x, params[name]) for name in ("gate", "up")
    )
    h = jax.nn.silu(gate) * up
    return jnp.einsum("egcf,efm->egcm", h, params["down"]).reshape(EXPERTS, ROWS, D)


def weight_first(params, x):
    gate, up = (jnp.einsum("edf,ecd->ecf", params[name], x) for name in ("gate", "up"))
    return jnp.einsum("efd,ecf->ecd", params["down"], jax.nn.silu(gate) * up)


WAYS = {
    "einsum": by_einsum,
    "vmap": lambda params, x: jax.vmap(gated)(params, x),
    "groups": in_groups,
    "weight first": weight_first,
    "matmul": gated,
}


def loss(forward, params, x):
    return jnp.mean(jnp.square(forward(params, x)))


def step(forward, params, x):
    return jax.value_and_grad(functools.partial(loss, forward))(params, x)


def whole(forward, *options, **more):
    return fp8_transform(functools.partial(step, forward), *options, **more)


@functools.cache
def expected(recipe):
    return whole(one_by_one, recipe)(PARAMS, X)


RECIPES = {
    "default": recipes.deepseek_v3(),
    "codes kept": recipes.deepseek_v3(residual="fp8"),
    "blocked": recipes.blocked_wgrad(),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_whole_steps(way, recipe):
    fn = whole(WAYS[way], RECIPES[recipe])
    assert fn.report(PARAMS, X).fraction == 1.0
    chex.assert_trees_all_equal(fn(PARAMS, X), expected(RECIPES[recipe]))


@pytest.mark.parametrize("way", ["einsum", "vmap", "weight first"])
def test_forward_functions_differentiated_outside(way):
    fn = fp8_transform(WAYS[way])
    assert fn.report(PARAMS, X).fraction == 1.0
    got = jax.jit(functools.partial(step, fn))(PARAMS, X)
    chex.assert_trees_all_equal(got, expected(recipes.deepseek_v3()))


def test_rows_tell_the_sizes_of_an_entry():
    rows = whole(by_einsum).report(PARAMS, X).rows
    sizes = {(r.role, r.m, r.n, r.k, r.count) for r in rows if r.path == "down"}
    assert sizes == {
        ("fprop", ROWS, D, HIDDEN, EXPERTS),
        ("dgrad", ROWS, HIDDEN, D, EXPERTS),
        ("wgrad", HIDDEN, D, ROWS, EXPERTS),
    }


def test_heads_with_projections_of_their_own():
    w, x = {"w": normal(4, 3, D, HIDDEN)}, normal(5, 2, 70, 3, D)

    def heads(params, x):
        return jnp.einsum("bthd,hdf->bthf", x, params["w"])

    def apart(params, x):
        return jnp.stack([x[:, :, h] @ params["w"][h] for h in range(3)], axis=2)

    assert whole(heads).report(w, x).fraction == 1.0
    # The loss is a sum in another order.
    chex.assert_trees_all_equal(whole(heads)(w, x)[1], whole(apart)(w, x)[1])


def test_two_batch_dimensions():
    w = {"w": normal(6, 2, 3, D, HIDDEN)}
    x = normal(7, 2, 3, ROWS, D)

    def mapped(params, x):
        return jnp.einsum("abcd,abdf->abcf", x, params["w"])

    def apart(params, x):
        rows = [[x[a, b] @ params["w"][a, b] for b in range(3)] for a in range(2)]
        return jnp.stack([jnp.stack(row) for row in rows])

    assert whole(mapped).report(w, x).fraction == 1.0
    wanted = whole(apart)(w, x)
    chex.assert_trees_all_equal(whole(mapped)(w, x), wanted)
    forward = functools.partial(step, fp8_transform(mapped))
    chex.assert_trees_all_equal(jax.jit(forward)(w, x), wanted)


def test_layers_of_experts_in_a_scan_under_remat():
    stacked = {name: np.stack([w, -w]) for name, w in PARAMS.items()}

    def scanned(forward, params, x):
        def body(x, params):
            return x + forward(params, x), None

        return jax.lax.scan(jax.checkpoint(body), x, params)[0]

    got, wanted = (
        whole(functools.partial(scanned, f))(stacked, X)
        for f in (by_einsum, one_by_one)
    )
    chex.assert_trees_all_equal(got, wanted)


def test_statistics_are_of_all_entries_together():
    _, stats = whole(by_einsum, stats=True)(PARAMS, X)
    largest = np.abs(PARAMS["down"]).max()
    np.testing.assert_array_equal(stats["down"]["fprop"]["amax"][1], largest)
    assert stats["down"]["wgrad"]["sqnr_db"].shape == (2,)


def test_few_rows_and_narrow_weights_stay_and_say_why():
    few = whole(by_einsum).report(PARAMS, X[:, :127])
    assert few.fraction == 0.0
    (reason,) = {row.reason for row in few.rows}
    assert reason.startswith(f"a batch of {EXPERTS} weights for 127 rows each: under")
    narrow = {"w": normal(8, EXPERTS, D, 96)}
    fn = fp8_transform(lambda params, x: jnp.einsum("ecd,edf->ecf", x, params["w"]))
    assert "min_dim" in fn.report(narrow, X).rows[0].reason


def test_attention_and_gradients_of_each_example_are_no_layers():
    def attention(params, x):
        q = x @ params["up"][0]
        return jnp.einsum("btd,bsd->bts", q, q)

    reports = [
        whole(attention).report(PARAMS, X),
        fp8_transform(
            jax.vmap(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), (None, 0)),
            weights=0,
        ).report(PARAMS["up"][0], X),
    ]
    for report in reports:
        assert all(r.status == "skipped" for r in report.rows if r.role == "other")
        assert sum(r.role == "other" for r in report.rows) >= 1


def test_experts_on_an_explicit_mesh_keep_their_types():
    mesh = jax.make_mesh((2,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params, x = jax.device_put((PARAMS, X), NamedSharding(mesh, PartitionSpec("e")))
        fn = whole(by_einsum)
        assert fn.report(params, x).fraction == 1.0
        _, grads = fn(params, x)
    assert grads["up"].sharding.spec[0] == "e"
    chex.assert_trees_all_equal(grads, expected(recipes.deepseek_v3())[1])


@pytest.mark.parametrize("spec", [("e", None, None), ("e", None, "t")])
def test_sharded_experts_have_the_plain_step_s_collectives(spec):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("e", "t"), axis_types=auto)
    spread = NamedSharding(mesh, PartitionSpec(*spec))
    params = {name: jax.device_put(w, spread) for name, w in PARAMS.items()}
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("e")))
    fn = whole(by_einsum)
    assert fn.report(params, x).fraction == 1.0

    def collectives(fn):
        text = fn.lower(params, x).compile().as_text()
        kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        return {kind: text.count(f" {kind}(") for kind in kinds}

    plain = jax.jit(functools.partial(step, by_einsum))
    assert collectives(fn) == collectives(plain)
    if spec[2] is None:  # Else tiles begin anew within 128 columns.
        chex.assert_trees_all_close(
            fn(params, x), expected(recipes.deepseek_v3()), rtol=1e-5, atol=1e-7
        )
