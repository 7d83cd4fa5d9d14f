"""Every product of a train step is told what it is, whatever the step is made of."""

import collections
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

from fp8jax import recipes
from fp8jax.transform import fp8_transform
from fp8jax.transform.analysis._roles import NO_WEIGHT, NO_WEIGHT_BACKWARD

D = 128
LAYER = ("fprop", "wgrad", "dgrad")


def weight(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = weight(9, 2, 64, D)
AB = {"a": weight(0, D, D), "b": weight(1, D, D)}


def grad_of(forward):
    """A step: `(params, x) -> loss, gradients`."""

    def loss(params, x):
        return jnp.mean(jnp.square(forward(params, x)))

    return jax.value_and_grad(loss)


def mlp(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])


def report_of(forward, params, *args, **options):
    return fp8_transform(grad_of(forward), **options).report(params, *args)


def found(report, status="fp8"):
    """How often each (path, role) has this status."""
    rows = [(r.path, r.role) for r in report.rows if r.status == status]
    return dict(collections.Counter(rows))


def expected(layers, first=()):
    """All three roles of these layers; `first` ones have no input to differentiate."""
    rows = [(path, role) for path in layers for role in LAYER]
    rows += [(path, role) for path in first for role in ("fprop", "wgrad")]
    return dict(collections.Counter(rows))


def test_roles_and_tiles_of_a_step_are_those_of_the_deepseek_v3_table():
    report = report_of(mlp, AB, X)
    assert [(r.path, r.role, r.tiles, r.m, r.n, r.k) for r in report.rows] == [
        ("a", "fprop", "1x128 128x128", 128, D, D),
        ("b", "fprop", "1x128 128x128", 128, D, D),
        ("b", "wgrad", "1x128 1x128", D, D, 128),
        ("b", "dgrad", "1x128 128x128", 128, D, D),
        ("a", "wgrad", "1x128 1x128", D, D, 128),
    ]
    assert report.fraction == 1.0


# A decoder of stacked layers under scan and remat, with Muon: every kind of product.
VOCABULARY, HIDDEN = 64, 256


def decoder_params():
    shapes = {
        "qkv": (D, 3 * D),
        "out": (D, D),
        "gate": (D, HIDDEN),
        "up": (D, HIDDEN),
        "down": (HIDDEN, D),
    }
    layers = {n: weight(i, 2, *s) for i, (n, s) in enumerate(shapes.items())}
    return {
        "embed": weight(7, VOCABULARY, D),
        "layers": {**layers, "norm": jnp.ones((2, D))},
        "lm_head": weight(8, D, VOCABULARY),
    }


def decoder_loss(params, tokens):
    bf16 = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))

    def block(x, layer):
        layer = bf16(layer)
        h = x * layer["norm"]
        q, k, v = jnp.split(jnp.einsum("btd,de->bte", h, layer["qkv"]), 3, -1)
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        x = x + jnp.einsum("bts,bsd->btd", scores, v) @ layer["out"]
        h = x * layer["norm"]
        h = jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])
        return x + h @ layer["down"], None

    x = bf16(params["embed"])[tokens]
    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
    logits = (x @ bf16(params["lm_head"])).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.mean(losses)


def test_every_product_of_a_scanned_rematted_decoder_with_muon_is_classified():
    optimizer = optax.contrib.muon(1e-3)

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(decoder_loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = decoder_params()
    tokens = jnp.zeros((2, 64), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # optax's own counters need it.
        report = fp8_transform(step).report(params, optimizer.init(params), tokens)
    layers = [f"layers/{name}" for name in ("qkv", "out", "gate", "up", "down")]
    # The last product of a block has no consumer in the backward pass.
    again = {(path, "recompute"): 1 for path in layers if path != "layers/down"}
    assert found(report) == {**expected(layers), **again}
    skipped = [r for r in report.rows if r.status == "skipped"]
    head = [r for r in skipped if r.path == "lm_head"]
    assert sorted(r.role for r in head) == ["dgrad", "fprop", "wgrad"]
    assert all("output head" in r.reason for r in head)
    attention = [r for r in skipped if "btd,bsd->bts" in r.path]
    assert len(attention) == 4  # Forward, recomputed, and two gradients.
    muon = [r for r in skipped if "optimizer" in r.reason]
    assert len(muon) + len(attention) * 2 + len(head) == len(skipped)
    assert len(muon) >= 3
    assert all(row.count == 2 for row in report.rows if row.status == "fp8")


@pytest.mark.parametrize(
    ("policy", "recomputed"),
    [
        (None, 4),
        ("nothing_saveable", 4),
        ("everything_saveable", 0),
        ("dots_saveable", 0),
        ("dots_with_no_batch_dims_saveable", 0),
        (("save_only_these_names", "hidden"), 2),
        (("save_anything_except_these_names", "hidden"), 0),
        (("save_any_names_but_these", "hidden"), 4),
        (("save_and_offload_only_these_names", "hidden"), 2),
        (("offload_dot_with_no_batch_dims", "device", "pinned_host"), 0),
        ("both", 0),
    ],
)
def test_every_remat_policy_keeps_wgrad_with_its_layer(policy, recomputed):
    policies = jax.checkpoint_policies
    if policy == "both":
        named = policies.save_only_these_names("hidden")
        policy = policies.save_from_both_policies(named, policies.dots_saveable)
    elif policy and policy[0] == "save_and_offload_only_these_names":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["hidden"],
            names_which_can_be_offloaded=[],
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif isinstance(policy, tuple):
        policy = getattr(policies, policy[0])(*policy[1:])
    elif policy:
        policy = getattr(policies, policy)

    @functools.partial(jax.checkpoint, policy=policy)
    def block(x, layer):
        hidden = checkpoint_name(jax.nn.gelu(x) @ layer["a"], "hidden")
        return x + jnp.tanh(jnp.tanh(hidden) @ layer["b"])

    def forward(params, x):
        return block(block(x, params[0]), params[1])

    report = report_of(forward, [AB, AB], X)
    layers = ["0/b", "1/a", "1/b"]
    wanted = expected(layers, first=["0/a"])
    got = found(report)
    assert {k: n for k, n in got.items() if k[1] != "recompute"} == wanted
    assert sum(n for (_, role), n in got.items() if role == "recompute") == recomputed
    assert report.fraction == 1.0


def test_scan_of_remat_in_remat_recomputes_twice_and_pairs_every_wgrad():
    def forward(params, x):
        def body(x, layer):
            return jax.checkpoint(mlp)(layer, x), None

        return jax.checkpoint(lambda p, x: jax.lax.scan(body, x, p)[0])(params, x)

    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), AB)
    report = report_of(forward, stacked, X)
    assert found(report) == expected("ab") | {
        ("a", "recompute"): 2,
        ("b", "recompute"): 2,
    }


def test_weights_sliced_by_a_loop_counter_stay_weights():
    def forward(params, x):
        return jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ params["a"][i]), x)

    report = report_of(forward, {"a": weight(0, 2, D, D)}, X)
    assert found(report) == expected("a")
    assert report.fraction == 1.0


def test_branches_of_cond_and_switch_are_entered():
    def forward(params, x):
        x = jnp.sin(x + params["bias"])
        x = jax.lax.cond(
            x[0, 0, 0] > 0, lambda x: jnp.tanh(x @ params["a"]), jnp.cos, x
        )
        branches = [jnp.sin, lambda x: jnp.tanh(x @ params["b"])]
        return jax.lax.switch((x[0, 0, 0] > 0).astype(jnp.int32), branches, x)

    report = report_of(forward, {**AB, "bias": jnp.zeros(D)}, X)
    assert found(report) == expected("ab")


def test_nested_jit_and_vmap_do_not_hide_layers():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def forward(params, x):
        def one(x):
            return layer(params["b"], layer(params["a"], x))

        return jax.vmap(jax.vmap(one))(x)

    assert found(report_of(forward, AB, X)) == expected("b", first="a")


def test_gradient_accumulation_by_scan_is_classified_within():
    def step(params, xs):
        def body(total, x):
            loss, grads = grad_of(mlp)(params, x)
            return jax.tree.map(jnp.add, total, grads), loss

        return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), xs)

    report = fp8_transform(step).report(AB, X)
    assert found(report) == expected("b", first="a")
    assert {row.count for row in report.rows} == {2}


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_train_steps_in_a_loop_are_classified_though_they_change_the_parameters(loop):
    def one(params, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p["a"]) @ p["b"]))(params)
        return jax.tree.map(lambda p, g: p - g, params, grads)

    def train(params, batches):
        if loop == "scan":
            body = lambda params, x: (one(params, x), None)  # noqa: E731
            return jax.lax.scan(body, params, batches)[0]
        body = lambda i, params: one(params, batches[i])  # noqa: E731
        return jax.lax.fori_loop(0, jnp.int32(len(batches)), body, params)

    params = {"a": jnp.ones((D, D)), "b": jnp.ones((D, 2 * D))}
    fn = fp8_transform(train)
    rows = fn.report(params, jnp.ones((2, 64, D))).rows
    assert {(r.path, r.role, r.status) for r in rows} == {
        ("a", "fprop", "fp8"),
        ("b", "fprop", "fp8"),
        ("b", "wgrad", "fp8"),
        ("b", "dgrad", "fp8"),
        ("a", "wgrad", "fp8"),
    }
    assert {r.count for r in rows} == {2 if loop == "scan" else 1}


def test_recurrence_pairs_both_weights_that_share_a_cotangent():
    def forward(params, xs):
        def cell(h, x):
            return jnp.tanh(h @ params["a"] + x @ params["b"]), None

        return jax.lax.scan(cell, jnp.zeros((64, D)), xs)[0]

    assert found(report_of(forward, AB, X)) == expected("a", first="b")


def test_wgrads_that_share_a_cotangent_find_their_layer_by_the_saved_activation():
    # No input is differentiated, so no dgrad tells the layers apart.
    def forward(params, xs):
        def body(total, x):
            y = jnp.tanh(jnp.sin(x) @ params["a"] + jnp.cos(x) @ params["b"])
            return total + jnp.sum(jnp.square(y)), None

        return jax.lax.scan(body, 0.0, xs)[0]

    report = report_of(forward, AB, X, rules=[recipes.Rule("a")])
    assert found(report) == expected("", first="b")
    assert found(report, "skipped") == expected("", first="a")


def test_einsum_in_any_order_of_dimensions_finds_activation_and_weight():
    def forward(params, x):
        x = jnp.einsum("btd,fd->btf", x, params["a"])
        x = jnp.einsum("df,btd->fbt", params["b"], jnp.tanh(x))
        x = jnp.einsum("hde,dbt->bthe", params["c"], jnp.tanh(x))
        return jnp.einsum("bthe,hed->btd", jnp.tanh(x), params["d"])

    params = {**AB, "c": weight(2, 2, D, 64), "d": weight(3, 2, 64, D)}
    report = report_of(forward, params, X)
    assert found(report) == expected("bcd", first="a")
    tiles = {(r.path, r.role): r.tiles for r in report.rows}
    # Tiles are in the order of the operands; `df,btd` has the weight first.
    assert tiles["b", "fprop"] == "128x128 1x128"
    assert {tiles[path, "wgrad"] for path in "abcd"} == {"1x128 1x128"}


def test_float_inputs_of_the_first_layer_are_not_taken_for_a_weight():
    square = weight(5, D, D)  # The shape of a weight, too.
    report = report_of(mlp, AB, square)
    assert found(report) == expected("b", first="a")
    assert report.fraction == 1.0


def test_weight_used_twice_has_both_wgrads():
    def forward(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"])

    got = found(report_of(forward, {"a": AB["a"]}, X))
    assert got == {("a", "fprop"): 2, ("a", "wgrad"): 2, ("a", "dgrad"): 1}


def test_tied_embedding_is_skipped_with_all_its_gradients():
    def forward(params, tokens):
        x = jnp.tanh(params["embed"][tokens] @ params["a"])
        return x @ params["embed"].T

    params = {"embed": weight(0, 256, D), "a": AB["a"]}
    report = report_of(forward, params, jnp.zeros((2, 64), jnp.int32))
    assert found(report) == expected("a")
    skipped = [r for r in report.rows if r.status == "skipped"]
    assert [r.role for r in skipped] == ["fprop", "wgrad", "dgrad"]
    assert all(r.path == "embed" and "embedding" in r.reason for r in skipped)


def test_low_rank_adapter_is_skipped_and_its_frozen_base_named():
    def loss(adapter, base, x):
        y = x @ base["w"] + (x @ adapter["down"]) @ adapter["up"]
        return jnp.mean(jnp.square(jnp.tanh(y)))

    adapter = {"down": weight(0, D, 8), "up": weight(1, 8, D)}
    base = {"w": weight(2, D, D)}
    step = jax.value_and_grad(loss)
    report = fp8_transform(step).report(adapter, base, X)
    assert not found(report)
    reasons = {r.path: r.reason for r in report.rows if r.role == "fprop"}
    assert set(reasons) == {"down", "up"}
    assert all("min_dim=128" in reason for reason in reasons.values())
    assert any("base/w" in r.reason and "weights=" in r.reason for r in report.rows)
    # Told that the base is a parameter, the transform takes it.
    told = fp8_transform(step, weights=["adapter", "base"]).report(adapter, base, X)
    assert found(told) == {("w", "fprop"): 1}


def test_frozen_weight_beside_trained_ones_has_fprop_and_dgrad():
    def forward(params, x):
        h = jnp.tanh(x @ params["a"])
        return jnp.tanh(h @ jax.lax.stop_gradient(params["frozen"])) @ params["b"]

    params = {**AB, "frozen": weight(2, D, D)}
    report = report_of(forward, params, X)
    frozen = {("frozen", "fprop"): 1, ("frozen", "dgrad"): 1}
    assert found(report) == expected("b", first="a") | frozen
    assert report.fraction == 1


def test_merged_low_rank_weight_is_a_weight_named_by_its_largest_part():
    def forward(params, x):
        merged = params["a"] + params["down"] @ params["up"]
        return jnp.tanh(x @ merged) @ params["b"]

    params = {**AB, "down": weight(2, D, 8), "up": weight(3, 8, D)}
    report = report_of(forward, params, X)
    assert found(report) == expected("b", first="a")
    assert any("both operands" in r.reason for r in report.rows)


def test_rescaled_weight_keeps_its_path():
    def forward(params, x):
        w = params["a"] / jnp.linalg.norm(params["a"], axis=0) * params["gain"]
        return jnp.tanh(x @ w) @ params["b"]

    report = report_of(forward, {**AB, "gain": jnp.ones(D)}, X)
    assert found(report) == expected("b", first="a")


def test_evaluation_outside_differentiation_is_skipped():
    def step(params, x):
        return grad_of(mlp)(params, x), mlp(params, x)

    report = fp8_transform(step).report(AB, X)
    assert found(report) == expected("b", first="a")
    outside = [r for r in report.rows if "outside differentiation" in r.reason]
    assert len(outside) == 2


def test_teacher_whose_first_layer_sees_the_student_s_input_is_skipped():
    def step(params, teacher, x):
        def loss(params):
            return jnp.mean(jnp.square(mlp(params, x) - mlp(teacher, x)))

        return jax.value_and_grad(loss)(params)

    report = fp8_transform(step).report(AB, jax.tree.map(jnp.negative, AB), X)
    assert found(report) == expected("b", first="a")
    skipped = [r for r in report.rows if r.status == "skipped"]
    assert len(skipped) == 2
    assert all("would be in FP8 if teacher/" in r.reason for r in skipped)


def test_gan_step_trains_both_networks_and_takes_no_batch_for_a_weight():
    def generate(params, z):
        return jnp.tanh(mlp(params, z))

    def judge(params, x):
        y = mlp({"a": params["c"], "b": params["d"]}, x)
        return jnp.mean(jnp.square(y))

    def step(generator, critic, real, z):
        def critic_loss(critic):
            return judge(critic, generate(generator, z)) - judge(critic, real)

        def generator_loss(generator):
            gap = judge(critic, generate(generator, z)) - judge(critic, real)
            return -gap

        grads = jax.grad(generator_loss)(generator), jax.grad(critic_loss)(critic)
        return jax.tree.map(lambda p, g: p - g, (generator, critic), grads)

    critic = {"c": AB["a"], "d": AB["b"]}
    report = fp8_transform(step).report(AB, critic, X, 2 * X)
    rows = {(r.path, r.role) for r in report.rows if r.status == "fp8"}
    assert {path for path, _ in rows} == set("abcd")
    assert {("a", "wgrad"), ("b", "dgrad"), ("c", "wgrad"), ("d", "wgrad")} <= rows
    assert ("c", "dgrad") in rows  # On its way to the generator.
    assert not [r for r in report.rows if "real" in r.path]
    assert report.fraction > 0.99


def test_second_derivatives_are_left_alone():
    def penalty(params, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.square(mlp(params, x))))(x))

    report = fp8_transform(jax.grad(penalty)).report(AB, X)
    assert not found(report)
    assert all("second-order" in r.reason for r in report.rows)


def test_batch_closed_over_still_leaves_the_weight_the_weight():
    report = fp8_transform(jax.grad(lambda p: jnp.sum(mlp(p, X)))).report(AB)
    assert found(report) == expected("b", first="a")


def test_optimizer_state_beside_the_parameters_is_no_parameter():
    def step(state):
        loss, grads = grad_of(mlp)(state["params"], state["x"])
        mu = jax.tree.map(lambda m, g: 0.9 * m + g, state["mu"], grads)
        params = jax.tree.map(lambda p, m: p - m, state["params"], mu)
        return {**state, "params": params, "mu": mu}, loss

    report = fp8_transform(step).report({"params": AB, "mu": AB, "x": X})
    assert found(report) == expected(["params/b"], first=["params/a"])


def test_recipe_without_wgrad_leaves_only_wgrad():
    report = report_of(mlp, AB, X, recipe=recipes.bf16_wgrad())
    assert {r.role for r in report.rows if r.status == "skipped"} == {"wgrad"}
    assert {r.role for r in report.rows if r.status == "fp8"} == {"fprop", "dgrad"}


def test_forward_alone_knows_parameters_by_hint_by_order_or_by_weights():
    by_order = fp8_transform(mlp).report(AB, X)
    assert found(by_order) == {("a", "fprop"): 1, ("b", "fprop"): 1}

    def swapped(x, variables):
        return mlp(variables["params"], x)

    by_hint = fp8_transform(swapped).report(X, {"params": AB})
    assert found(by_hint) == {("params/a", "fprop"): 1, ("params/b", "fprop"): 1}

    def flat(x, a):
        return x @ a

    unknown = fp8_transform(flat).report(X, AB["a"])
    assert not found(unknown)
    assert "weights=" in unknown.rows[0].reason
    for weights in ("a", 1, ["a"], lambda path: path == "a"):
        told = fp8_transform(flat, weights=weights).report(X, AB["a"])
        assert found(told) == {("a", "fprop"): 1}


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (jnp.int8, "int8"),
        (jnp.complex64, "complex64"),
        (jnp.float8_e4m3fn, "already FP8"),
    ],
)
def test_dtypes_that_fp8_cannot_stand_for_are_skipped(dtype, reason):
    def forward(params, x):
        return x.astype(dtype) @ params["a"].astype(dtype)

    report = fp8_transform(forward).report(AB, X)
    assert not found(report)
    assert reason in report.rows[0].reason


def test_float64_is_skipped():
    with jax.enable_x64(True):
        x, params = X.astype(jnp.float64), {"a": AB["a"].astype(jnp.float64)}
        report = fp8_transform(lambda p, x: x @ p["a"]).report(params, x)
    assert not found(report)
    assert "float64" in report.rows[0].reason


def test_small_weights_are_skipped():
    def forward(params, x):
        return x @ params["narrow"]

    params = {"narrow": weight(1, D, 96)}
    (row,) = fp8_transform(forward).report(params, X).rows
    assert row.reason == "by default: a weight of fewer features than min_dim=128"
    small = fp8_transform(forward, min_dim=64).report(params, X)
    assert found(small) == {("narrow", "fprop"): 1}


def test_gradients_of_batched_experts_are_told_apart_from_products_without_one():
    params = {"up": jnp.ones((4, D, 2 * D)), "down": jnp.ones((4, 2 * D, D))}

    def loss(params, x):
        hidden = jnp.tanh(jnp.einsum("gmk,gkn->gmn", x, params["up"]))
        out = jnp.einsum("gmk,gkn->gmn", hidden, params["down"])
        scores = jnp.einsum("gmk,gnk->gmn", out, out)  # Of no parameter.
        return jnp.sum(scores**2)

    report = fp8_transform(jax.grad(loss)).report(params, jnp.ones((4, D, D)))
    rows = [row for row in report.rows if row.role != "other"]
    assert {row.status for row in rows} == {"fp8"}
    assert sorted((row.path, row.role) for row in rows) == [
        ("down", "dgrad"),
        ("down", "fprop"),
        ("down", "wgrad"),
        ("up", "fprop"),
        ("up", "wgrad"),
    ]
    others = {row.reason for row in report.rows if row.role == "other"}
    assert others == {NO_WEIGHT, NO_WEIGHT_BACKWARD}
