"""Parameters that the step scales, masks, stacks or updates are parameters still.

The oracle is the step with its products written in FP8 by hand, `fp8jax.dot_general`
under `jax.grad`: the same bits in float32, where every product of a layer is found.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fp8jax
from fp8jax.transform import fp8_transform

D, ROWS = 128, 64


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape or (D, D)) * 0.1


X = normal(9, ROWS, D)
AB = [normal(0), normal(1)]
GAINS = [normal(2, D), normal(3, D)]
MASKS = [normal(4) > 0, normal(5) > 0]
KEY = jax.random.key(6)


def plain(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def by_hand(x, w):
    return fp8jax.dot_general(x, w, (((1,), (0,)), ((), ())))


def mlp(weights, x, dot):
    for w in weights:
        x = jnp.tanh(dot(x, w))
    return x


def loss_of(weights, x, dot):
    return jnp.mean(jnp.square(mlp(weights, x, dot) - 1))


def sgd(params, grads, rate=0.1):
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def assert_all_in_fp8(step, *args, bits=True, **options):
    """Of `step(dot, *args)`: all products in FP8, and the bits of those by hand."""
    fp8_step = fp8_transform(functools.partial(step, plain), **options)
    report = fp8_step.report(*args)
    assert report.fraction == 1, str(report)
    if bits:
        expected = jax.jit(functools.partial(step, by_hand))(*args)
        got = fp8_step(*args)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)
    return {row.path for row in report.rows}


def gained(params, x, dot):
    weights = [w * (1 + g) for w, g in zip(params["w"], params["g"], strict=True)]
    return loss_of(weights, x, dot)


def normed(params, x, dot):
    weights = [
        g * v / jnp.linalg.norm(v, axis=0)
        for v, g in zip(params["w"], params["g"], strict=True)
    ]
    return loss_of(weights, x, dot)


def standardized(params, x, dot):
    weights = [(w - w.mean(0)) / (w.std(0) + 1e-3) for w in params["w"]]
    return loss_of(weights, x, dot)


def pruned(params, x, dot):
    def prune(w):
        return jnp.where(jnp.abs(w) > jnp.median(jnp.abs(w)), w, 0)

    return loss_of([*map(prune, params["w"])], x, dot)


def masked(params, x, dot, masks=MASKS):
    pairs = zip(params["w"], masks, strict=True)
    return loss_of([jnp.where(mask, w, 0) for w, mask in pairs], x, dot)


def masked_by_floats(params, x, dot, masks=MASKS):
    pairs = zip(params["w"], masks, strict=True)
    return loss_of([w * mask.astype(w.dtype) for w, mask in pairs], x, dot)


def noisy(params, x, dot, key=KEY):
    keys = jax.random.split(key)
    pairs = zip(params["w"], keys, strict=True)
    drop = [(w, jax.random.bernoulli(k, 0.9, w.shape)) for w, k in pairs]
    weights = [jnp.where(kept, w, 0) for w, kept in drop]
    kept = jax.random.bernoulli(key, 0.9, x.shape)
    return loss_of(weights, jnp.where(kept, x, 0), dot)


PARAMS = {"w": AB, "g": GAINS}
DERIVED = {
    "gain": (gained, ()),
    "weight norm": (normed, ()),
    "standardized": (standardized, ()),
    "pruned": (pruned, ()),
    "mask closed over": (masked, ()),
    "mask as argument": (masked, (MASKS,)),
    "mask of floats": (masked_by_floats, (MASKS,)),
    "noise": (noisy, (KEY,)),
    "noise of an old key": (noisy, (jax.random.PRNGKey(6),)),
}


@pytest.mark.parametrize("options", [{}, {"weights": "params"}], ids=["found", "told"])
@pytest.mark.parametrize("name", DERIVED)
def test_weights_made_of_parameters_are_found_with_all_their_gradients(name, options):
    loss, more = DERIVED[name]

    def step(dot, params, x, *more):
        value, grads = jax.value_and_grad(loss)(params, x, dot, *more)
        return value, sgd(params, grads)

    paths = assert_all_in_fp8(step, PARAMS, X, *more, **options)
    assert paths == {"w/0", "w/1"}


@pytest.mark.parametrize("name", ["gain", "weight norm", "mask of floats"])
def test_derived_weights_are_found_where_the_step_returns_gradients_alone(name):
    loss, more = DERIVED[name]

    def step(dot, params, x, *more):
        return jax.grad(loss)(params, x, dot, *more)

    # A square batch, as large as each weight.
    assert_all_in_fp8(step, PARAMS, normal(8), *more)


@pytest.mark.parametrize("name", ["gain", "mask as argument"])
def test_derived_weights_are_found_in_a_forward_function_and_under_remat(name):
    loss, more = DERIVED[name]
    rematted = jax.checkpoint(loss, static_argnums=2)
    forward = functools.partial(lambda dot, p, x, *more: loss(p, x, dot, *more))
    assert_all_in_fp8(forward, PARAMS, X, *more)

    def step(dot, params, x, *more):
        return jax.grad(rematted)(params, x, dot, *more)

    assert_all_in_fp8(step, PARAMS, X, *more)


def test_low_rank_update_of_a_weight_and_its_magnitude_leave_it_the_weight():
    """DoRA: `m (W + a b) / |W + a b|`, trained or frozen below."""
    params = {"a": normal(2, D, 8), "b": normal(3, 8, D), "m": normal(4, D)}

    def step(params, base, x):
        def loss(params):
            w = base["w"] + params["a"] @ params["b"]
            w = params["m"] * w / jnp.linalg.norm(w, axis=0)
            return jnp.mean(jnp.square(jnp.tanh(jnp.tanh(x @ w) @ w)))

        return sgd(params, jax.grad(loss)(params))

    report = fp8_transform(step).report(params, {"w": normal(0)}, X)
    in_fp8 = [(r.path, r.role) for r in report.rows if r.status == "fp8"]
    layer = [("w", "fprop"), ("w", "dgrad"), ("w", "wgrad")]
    assert sorted(in_fp8) == sorted([*layer, ("w", "fprop"), ("w", "wgrad")])


STACKS = {
    "stack": jnp.stack,
    "set": lambda ws: jnp.zeros((2, D, D)).at[0].set(ws[0]).at[1].set(ws[1]),
    "concatenate": lambda ws: jnp.concatenate(ws).reshape(2, D, D),
}


@pytest.mark.parametrize("options", [{}, {"weights": "params"}], ids=["found", "told"])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_layers_stacked_in_the_step_are_found_and_named(stack, options):
    def loss(params, x, dot):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(dot(x, w)), None), x, stack(params))
        return jnp.mean(x**2)

    def step(dot, params, x):
        return sgd(params, jax.grad(loss)(params, x, dot))

    paths = assert_all_in_fp8(step, AB, X, **options)
    assert paths == {"0 | 1"}


def test_long_stack_is_named_by_its_first_and_last_layer():
    params = {"layers": [{"up": normal(i), "down": normal(9 + i)} for i in range(3)]}

    def loss(params, x):
        stacked = jax.tree.map(lambda *ws: jnp.stack(ws), *params["layers"])
        return jnp.mean(
            lax.scan(
                lambda x, w: (jnp.tanh(x @ w["up"]) @ w["down"], None), x, stacked
            )[0]
        )

    report = fp8_transform(jax.grad(loss)).report(params, X)
    assert report.fraction == 1
    paths = {row.path for row in report.rows}
    assert paths == {"layers/0..2/up", "layers/0..2/down"}


def test_rule_about_one_of_several_layers_in_a_stack_skips_the_stack_and_says_so():
    def loss(params, x):
        stacked = jnp.stack(params)
        return jnp.mean(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)[0])

    rules = [fp8jax.Rule("1", None)]
    report = fp8_transform(jax.grad(loss), rules=rules).report(AB, X)
    assert report.fraction == 0
    assert all("different rules" in row.reason for row in report.rows)


def test_sibling_concatenated_for_one_product_is_named_and_found():
    def loss(params, x, dot):
        both = dot(x, jnp.concatenate(params, axis=1))
        return jnp.mean(jnp.tanh(both[:, :D] * both[:, D:]) ** 2)

    def step(dot, params, x):
        return jax.grad(loss)(params, x, dot)

    assert assert_all_in_fp8(step, AB, X) == {"0 | 1"}


# Steps that train more than once.
def gradient(dot, params, x):
    return jax.grad(lambda params: loss_of(params, x, dot))(params)


def unrolled(dot, params, x):
    for _ in range(3):
        params = sgd(params, gradient(dot, params, x))
    return params


def sharpness_aware(dot, params, x):
    grads = gradient(dot, params, x)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads))
    worst = jax.tree.map(lambda p, g: p + 0.05 * g / norm, params, grads)
    return sgd(params, gradient(dot, worst, x))


def jitted_twice(dot, params, x):
    once = jax.jit(lambda params: sgd(params, gradient(dot, params, x)))
    return once(once(params))


def rematted(dot, params, x):
    def grads(params):
        return jax.grad(jax.checkpoint(lambda p: loss_of(p, x, dot)))(params)

    return grads(sgd(params, grads(params)))


def after_a_loop(dot, params, x):
    def body(_, params):
        return sgd(params, gradient(dot, params, x))

    return gradient(dot, lax.fori_loop(0, 2, body, params), x)


def where_finite(dot, params, x):
    grads = gradient(dot, params, x)
    finite = jnp.isfinite(grads[0]).all()
    kept = lax.cond(finite, lambda: sgd(params, grads), lambda: params)
    return gradient(dot, kept, x)


def clipped_and_projected(dot, params, x):
    params = [jnp.clip(p, -0.2, 0.2) for p in unrolled(dot, params, x)]
    return gradient(dot, [p / jnp.linalg.norm(p) for p in params], x)


def adversarial(dot, params, x):
    delta = jnp.zeros_like(x)
    for _ in range(2):
        moved = jax.grad(lambda delta: loss_of(params, x + delta, dot))(delta)
        delta = jnp.clip(delta + 0.01 * jnp.sign(moved), -0.1, 0.1)
    return gradient(dot, params, x + delta)


def both_gradients(dot, params, x):
    grads = jax.grad(loss_of, (0, 1))
    first, of_x = grads(params, x, dot)
    return grads(sgd(params, first), x + of_x, dot)


AGAIN = [
    unrolled,
    sharpness_aware,
    jitted_twice,
    rematted,
    after_a_loop,
    where_finite,
    clipped_and_projected,
    adversarial,
    both_gradients,
]


@pytest.mark.parametrize("options", [{}, {"weights": "params"}], ids=["found", "told"])
@pytest.mark.parametrize("step", AGAIN, ids=lambda step: step.__name__)
def test_parameters_updated_in_the_step_are_parameters_in_its_next_pass(step, options):
    # Where XLA fuses the update otherwise, a weight's last bit may be another.
    assert assert_all_in_fp8(step, AB, X, bits=False, **options) == {"0", "1"}


def test_unrolled_passes_have_the_numbers_of_products_by_hand():
    got = fp8_transform(functools.partial(unrolled, plain))(AB, X)
    expected = jax.jit(functools.partial(unrolled, by_hand))(AB, X)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.sgd(1e-2, momentum=0.9, nesterov=True),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.apply_if_finite(optax.adafactor(1e-3), 3),
    ],
    ids=["adamw", "momentum", "lion", "adafactor"],
)
def test_optimizer_s_state_beside_updated_parameters_does_not_hide_them(optimizer):
    def step(params, state, x):
        for _ in range(2):
            grads = gradient(plain, params, x)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    report = fp8_transform(step).report(AB, optimizer.init(AB), X)
    assert report.fraction == 1
    assert {row.path for row in report.rows} == {"0", "1"}


def test_gan_s_generator_is_trained_through_the_updated_discriminator():
    def step(g, d, z, real):
        def d_loss(d):
            fake = lax.stop_gradient(mlp(g, z, plain))
            return loss_of(d, real, plain) - loss_of(d, fake, plain)

        d = sgd(d, jax.grad(d_loss)(d))
        grads = jax.grad(lambda g: loss_of(d, mlp(g, z, plain), plain))(g)
        return sgd(g, grads), d

    args = AB, [normal(11), normal(12)], X, normal(13, ROWS, D)
    assert fp8_transform(step).report(*args).fraction == 1


def test_averaged_teacher_of_an_updated_student_is_multiplied_in_fp8():
    def step(student, teacher, x):
        student = sgd(student, gradient(plain, student, x))
        teacher = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, teacher, student)

        def loss(student):
            target = lax.stop_gradient(mlp(teacher, x, plain))
            return jnp.mean(jnp.square(mlp(student, x, plain) - target))

        return sgd(student, jax.grad(loss)(student)), teacher

    teacher = [normal(11), normal(12)]
    assert fp8_transform(step).report(AB, teacher, X).fraction == 1


def test_activations_that_parameters_went_into_are_no_weights():
    """Positions added to a batch of their own shape, a residual stream, attention."""
    params = {"w": AB, "positions": normal(7, ROWS, D), "gain": normal(8, D)}

    def loss(params, x):
        h = x * params["gain"] + params["positions"]
        h = h + jnp.tanh(h @ params["w"][0])
        return jnp.mean(jnp.square((h @ h.T) @ h @ params["w"][1]))

    report = fp8_transform(jax.grad(loss)).report(params, X)
    found = {(r.path, r.role) for r in report.rows if r.status == "fp8"}
    roles = ("fprop", "wgrad", "dgrad")
    assert found == {(f"w/{i}", role) for i in range(2) for role in roles}
    # Three of attention's products' kind, and their gradients, two each.
    assert sum(r.status == "skipped" for r in report.rows) == 6


def test_gradient_that_is_multiplied_as_an_input_is_no_weight():
    def step(params, x):
        into = jax.grad(lambda x: loss_of(params, x, plain))(x)
        return jax.grad(lambda p: loss_of(p, into, plain))(params)

    report = fp8_transform(step).report(AB, X)
    rows = [(r.path, r.role, r.status) for r in report.rows]
    assert {path for path, _, _ in rows} == {"0", "1"}
    assert all(status == "fp8" for _, _, status in rows)
