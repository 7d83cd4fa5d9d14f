"""The pass of an equation does not depend on what the user calls anything."""

import collections
import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from fp8jax.transform import fp8_transform
from fp8jax.transform.analysis._roles import SECOND_ORDER

D = 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = normal(9, 64, D)
AB = {"a": normal(0, D, D), "b": normal(1, D, D)}
LAYERS = [AB, jax.tree.map(jnp.negative, AB)]
STACKED = jax.tree.map(lambda *a: jnp.stack(a), *LAYERS)


def block(layer, x):
    return x + jnp.tanh(jnp.tanh(x @ layer["a"]) @ layer["b"])


def found(step, *args):
    """How often each (path, role) is in FP8; all products must be."""
    report = fp8_transform(step).report(*args)
    assert report.fraction == 1.0, str(report)
    return collections.Counter((row.path, row.role) for row in report.rows)


def loss_of(forward):
    return lambda params, x: jnp.mean(jnp.square(forward(params, x)))


def by_grad(forward):
    return jax.grad(loss_of(forward))


def by_vjp(forward):
    def step(params, x):
        with jax.named_scope("train"):
            y, backward = jax.vjp(lambda p: forward(p, x), params)
            with jax.named_scope("back"):
                return backward(2 * y / y.size)

    return step


def by_linearize(forward):
    def step(params, x):
        _, tangent = jax.linearize(lambda p: loss_of(forward)(p, x), params)
        (gradient,) = jax.linear_transpose(tangent, params)(1.0)
        return gradient

    return step


def under(names, forward):
    def scoped(params, x):
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(jax.named_scope(name))
            return forward(params, x)

    return scoped


def unrolled(one, params, x):
    for layer in params:
        x = one(layer, x)
    return x


def scanned(one, params, x):
    return jax.lax.scan(lambda x, layer: (one(layer, x), None), x, params)[0]


def nested(one, params, x):
    several = functools.partial(unrolled, jax.checkpoint(one))
    return jax.checkpoint(several)(params, x)


def by_rule(one, recompute):
    """`one` with a rule that keeps its inputs, and computes it again."""
    wrapped = jax.custom_vjp(one)

    def backward(residuals, dy):
        _, vjp = jax.vjp(jax.checkpoint(one) if recompute else one, *residuals)
        return vjp(dy)

    wrapped.defvjp(lambda *args: (one(*args), args), backward)
    return wrapped


GRADIENTS = ("fprop", "wgrad", "dgrad")
FORMS = {
    "plain": (unrolled, block),
    "remat": (unrolled, jax.checkpoint(block)),
    "remat of jit": (unrolled, jax.checkpoint(jax.jit(block))),
    "jit of remat": (unrolled, jax.jit(jax.checkpoint(block))),
    "remat in remat": (nested, block),
    "custom_vjp": (unrolled, by_rule(block, False)),
    "custom_vjp with remat": (unrolled, by_rule(block, True)),
    "remat of custom_vjp": (unrolled, jax.checkpoint(by_rule(block, False))),
    "scan": (scanned, block),
    "scan of remat": (scanned, jax.checkpoint(block)),
    "scan of custom_vjp": (scanned, by_rule(block, False)),
}
NAMES = {
    "none": (),
    "plain": ("decoder", "a/b"),
    "forward": ("jvp(x)", "jvp"),
    "backward": ("transpose(jvp(x))", "transpose", "a(b)c"),
    "recomputed": ("rematted_computation", "checkpoint"),
}


CASES = [
    (form, names)
    for form in FORMS
    for names in NAMES
    # Both the user and JAX call something of the rule's remat by the one name.
    if (form, names) != ("custom_vjp with remat", "recomputed")
]


@pytest.mark.parametrize(("form", "names"), CASES)
def test_roles_are_the_same_below_scopes_of_any_name(form, names):
    apply, one = FORMS[form]

    def inner(layer, x):
        return under(NAMES[names], one)(layer, x)

    def forward(params, x):
        return apply(inner, params, x)

    params = STACKED if apply is scanned else LAYERS
    got = found(by_grad(under(NAMES[names], forward)), params, X)
    if apply is scanned:
        wanted = {(path, role): 1 for path in "ab" for role in GRADIENTS}
    else:
        paths = [f"{i}/{name}" for i in range(2) for name in "ab"]
        wanted = {(path, role): 1 for path in paths for role in GRADIENTS}
        del wanted["0/a", "dgrad"]  # Nobody needs the gradient of the step's input.
    assert {key: n for key, n in got.items() if key[1] != "recompute"} == wanted
    again = any(role == "recompute" for _, role in got)
    assert again == (form not in ("plain", "scan"))


WAYS = {"grad": by_grad, "vjp": by_vjp, "linearize": by_linearize}
OPTIONS = [
    {"jax_use_direct_linearize": True},
    {"jax_use_direct_linearize": False},
    {"jax_remat3": True},
    {"jax_remat3": True, "jax_use_direct_linearize": False},
]


@contextlib.contextmanager
def configured(options):
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["remat", "scan of remat", "remat of custom_vjp"])
def test_roles_do_not_depend_on_how_jax_differentiates(form, way, options):
    if not all(hasattr(jax.config, name) for name in options):
        pytest.skip("this JAX has no such option")
    apply, one = FORMS[form]
    params = STACKED if apply is scanned else LAYERS
    forward = under(("decoder", "a/b"), functools.partial(apply, one))
    wanted = found(by_grad(forward), params, X)
    with configured(options):
        assert found(WAYS[way](forward), params, X) == wanted


@pytest.mark.parametrize("remat", [False, True])
def test_result_that_is_its_own_cotangent_has_a_backward_pass(remat):
    one = jax.checkpoint(block) if remat else block

    def step(params, x):  # The gradient of half the squared norm.
        y, backward = jax.vjp(lambda p: unrolled(one, p, x), params)
        return backward(y)

    def usual(params, x):
        return jax.grad(lambda p: 0.5 * jnp.sum(unrolled(one, p, x) ** 2))(params)

    assert found(step, LAYERS, X) == found(usual, LAYERS, X)


def test_step_under_remat3_has_the_bits_of_the_one_without():
    forward = under(("decoder",), functools.partial(unrolled, jax.checkpoint(block)))
    wanted = fp8_transform(by_grad(forward))(LAYERS, X)
    with configured({"jax_remat3": True}):
        got = fp8_transform(by_grad(forward))(LAYERS, X)
    chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("names", NAMES)
def test_gradients_of_each_example_keep_their_passes(names):
    def forward(params, x):
        return under(NAMES[names], jax.checkpoint(block))(params, x)

    step = jax.vmap(by_grad(forward), (None, 0))
    rows = fp8_transform(step, weights=0).report(AB, X).rows
    roles = collections.Counter(row.role for row in rows)
    # Each example's own weight gradient has a batch dimension.
    assert roles == {"fprop": 2, "recompute": 2, "dgrad": 1, "other": 2}


@pytest.mark.parametrize("names", NAMES)
def test_linear_part_of_a_custom_jvp_is_no_recomputation(names):
    layer = jax.custom_jvp(lambda w, x: x @ w)

    @layer.defjvp
    def rule(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return x @ w, x @ dw + dx @ w

    def forward(params, x):
        x = jnp.tanh(layer(params["a"], x))
        return layer(params["b"], x)

    got = found(by_grad(under(NAMES[names], forward)), AB, X)
    wanted = {(path, role): 1 for path in "ab" for role in GRADIENTS}
    del wanted["a", "dgrad"]
    # JAX gives the rule zeros for the tangent of the step's input.
    assert got == {**wanted, ("a", "fprop"): 2}


@pytest.mark.parametrize("names", NAMES)
def test_derivative_along_a_direction_in_the_loss_is_no_recomputation(names):
    def forward(params, x):
        def network(x):
            return under(NAMES[names], block)(params, x)

        y, dy = jax.jvp(network, (x,), (jnp.cos(x),))
        return y + dy

    report = fp8_transform(by_grad(under(NAMES[names], forward))).report(AB, X)
    assert report.fraction == 1.0, str(report)
    roles = collections.Counter(row.role for row in report.rows)
    # Of values and of tangents; neither the direction nor the input has a gradient.
    assert roles == {"fprop": 4, "wgrad": 4, "dgrad": 2}


def reversible(layers, x, recompute):
    """Blocks that give back their inputs: nothing between them is kept."""

    def couple(params, xs):
        left, right = xs
        left = left + jnp.tanh(right @ params["a"])
        return left, right + jnp.tanh(left @ params["b"])

    run = jax.custom_vjp(lambda layers, xs: unrolled(couple, layers, xs))

    def backward(residuals, cotangents):
        layers, (left, right) = residuals
        grads = []
        for params in reversed(layers):
            right = right - jnp.tanh(left @ params["b"])
            left = left - jnp.tanh(right @ params["a"])
            one = jax.checkpoint(couple) if recompute else couple
            _, vjp = jax.vjp(one, params, (left, right))
            grad, cotangents = vjp(cotangents)
            grads.insert(0, grad)
        return grads, cotangents

    def forward(layers, xs):
        ys = unrolled(couple, layers, xs)
        return ys, (layers, ys)

    run.defvjp(forward, backward)
    return sum(run(layers, (x, jnp.sin(x))))


@pytest.mark.parametrize("recompute", [False, True])
def test_reversible_blocks_recompute_and_are_no_gradients(recompute):
    step = by_grad(lambda params, x: reversible(params, x, recompute))
    report = fp8_transform(step).report(LAYERS, X)
    found = collections.Counter((row.path, row.role, row.status) for row in report.rows)
    for layer in ("0/a", "0/b", "1/a", "1/b"):
        assert found[layer, "fprop", "fp8"] == found[layer, "wgrad", "fp8"] == 1
        assert found[layer, "dgrad", "fp8"] == (layer != "0/a")
    assert not report.notes


def penalized(names):
    def step(params, x):
        def energy(x):
            return jnp.sum(jnp.square(under(NAMES[names], block)(params, x)))

        return jnp.mean(jnp.square(jax.grad(energy)(x)))

    return jax.grad(step)


@pytest.mark.parametrize("names", NAMES)
def test_gradient_in_the_loss_is_second_order_below_any_scope(names):
    step = penalized(names)
    outer = under(NAMES[names], step)
    for one in (step, outer, jax.jit(step)):
        rows = fp8_transform(one).report(AB, X).rows
        assert {row.reason for row in rows} == {SECOND_ORDER}


def test_gradient_computed_ahead_in_a_forward_rule_is_not_second_order():
    # As fused losses do: the rule's forward half keeps gradients, not logits.
    def objective(w, x):
        return jnp.mean(jnp.square(jnp.sin(x @ w)))

    ahead = jax.custom_vjp(objective)

    def forward(w, x):
        value, grads = jax.value_and_grad(objective, (0, 1))(w, x)
        return value, grads

    ahead.defvjp(forward, lambda grads, g: jax.tree.map(lambda x: g * x, grads))

    def loss(params, x):
        return ahead(params["c"], block(params, x))

    report = fp8_transform(jax.grad(loss)).report({**AB, "c": AB["a"]}, X)
    got = collections.Counter((row.path, row.role) for row in report.rows)
    wanted = {(path, role): 1 for path in "abc" for role in GRADIENTS}
    del wanted["a", "dgrad"]
    assert got == wanted, str(report)
    assert report.fraction == 1.0


def switched(layer, x):
    """Branches that keep different residuals of the same types."""
    kept = functools.partial(jnp.multiply, 2.0)
    branches = jax.checkpoint(block), block, lambda p, x: block(p, jnp.tanh(kept(x)))
    index = jnp.int32(jnp.sum(x) > 0) + jnp.int32(jnp.sum(x) > 9)
    return jax.lax.switch(index, branches, layer, x)


@pytest.mark.parametrize(
    ("over", "params"),
    [(unrolled, LAYERS), (scanned, STACKED)],
    ids=["unrolled", "scanned"],
)
@pytest.mark.parametrize("remat", [False, True])
def test_branches_do_not_read_each_other_s_residuals(over, params, remat):
    one = jax.checkpoint(switched) if remat else switched
    step = by_grad(functools.partial(over, one))
    counts = collections.Counter()
    for (_, role), n in found(step, params, X).items():
        counts[role] += n
    layers, branches = (1 if over is scanned else 2), 3
    assert counts["fprop"] == counts["wgrad"] == 2 * branches * layers
    # The first layer's input needs no gradient, which a scan does not tell.
    first = branches if over is unrolled else 0
    assert counts["dgrad"] == 2 * branches * layers - first
    assert counts["recompute"] == 2 * layers * (branches if remat else 1)


CHUNK = 128
MLP = {"up": normal(2, D, 4 * CHUNK), "down": normal(3, 4 * CHUNK, D)}


def over_chunks(loop, one, init):
    """`one(i, acc)` for each chunk of the hidden features, in a loop that counts."""
    if loop == "fori_loop":
        return jax.lax.fori_loop(0, 4, one, init)
    return jax.lax.scan(lambda acc, i: (one(i, acc), None), init, jnp.arange(4))[0]


def in_chunks(loop):
    """An MLP a part of whose hidden activations exists at a time, written by hand."""
    part = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=CHUNK)
    put = jax.lax.dynamic_update_slice_in_dim

    @jax.custom_vjp
    def mlp(p, x):
        def one(i, y):
            up, down = part(p["up"], i * CHUNK, axis=1), part(p["down"], i * CHUNK)
            return y + jnp.tanh(x @ up) @ down

        return over_chunks(loop, one, jnp.zeros_like(x))

    def backward(saved, dy):
        p, x = saved

        def one(i, gradients):
            dp, dx = gradients
            at = i * CHUNK
            up, down = part(p["up"], at, axis=1), part(p["down"], at)
            h = jnp.tanh(x @ up)
            dh = (dy @ down.T) * (1 - h * h)
            dp = {
                "up": put(dp["up"], x.T @ dh, at, axis=1),
                "down": put(dp["down"], h.T @ dy, at, axis=0),
            }
            return dp, dx + dh @ up.T

        init = jax.tree.map(jnp.zeros_like, p), jnp.zeros_like(x)
        return over_chunks(loop, one, init)

    mlp.defvjp(lambda p, x: (mlp(p, x), (p, x)), backward)
    return mlp


@pytest.mark.parametrize("loop", ["fori_loop", "scan"])
def test_counter_of_a_loop_in_a_rule_is_no_cotangent(loop):
    mlp = in_chunks(loop)

    def step(params, x):
        def loss(params):
            y = mlp(params["mlp"], x @ params["in"])
            return jnp.mean(jnp.square(y))

        return jax.grad(loss)(params)

    all_three = {"fprop": 1, "wgrad": 1, "dgrad": 1}
    roles = {"mlp/up": {**all_three, "recompute": 1}, "mlp/down": all_three}
    roles["in"] = {"fprop": 1, "wgrad": 1}
    counts = collections.Counter(
        {(path, role): n for path, of in roles.items() for role, n in of.items()}
    )
    params = {"mlp": MLP, "in": AB["a"]}
    assert found(step, params, X) == counts
    plain, quantized = jax.jit(step)(params, X), fp8_transform(step)(params, X)
    for exact, close in zip(*map(jax.tree.leaves, (plain, quantized)), strict=True):
        # Rounding to E4M3 has an rms of 2.6 %; six operands at most are behind each.
        assert jnp.linalg.norm(close - exact) < 0.15 * jnp.linalg.norm(exact)


def test_forward_rule_that_calls_its_function_is_a_forward_pass():
    def plain(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    mlp = jax.custom_vjp(plain)

    def backward(saved, dy):
        p, x = saved
        return jax.vjp(plain, p, x)[1](dy)

    mlp.defvjp(lambda p, x: (mlp(p, x), (p, x)), backward)
    step = by_grad(lambda p, x: mlp(p, x))
    counts = found(step, AB, X)
    assert counts["a", "fprop"] == counts["b", "fprop"] == 1
    assert counts["a", "recompute"] == counts["b", "dgrad"] == 1
    assert counts["a", "wgrad"] == counts["b", "wgrad"] == 1


def test_unused_gradient_of_the_input_in_a_rule_makes_no_parameter_of_it():
    layer = jax.custom_vjp(lambda w, x: x @ w)
    layer.defvjp(
        lambda w, x: (x @ w, (w, x)),
        lambda kept, dy: (kept[1].T @ dy, dy @ kept[0].T),
    )

    def forward(params, x):
        return layer(params["b"], jnp.tanh(layer(params["a"], x)))

    wanted = {(path, role): 1 for path in "ab" for role in GRADIENTS}
    del wanted["a", "dgrad"]
    assert found(by_grad(forward), AB, X) == wanted
    again = found(by_grad(jax.checkpoint(forward)), AB, X)
    assert again == {**wanted, ("a", "recompute"): 1}

    def recurrent(params, xs):
        def cell(h, x):
            return jnp.tanh(layer(params["a"], h) + layer(params["b"], x)), None

        return jax.lax.scan(cell, jnp.zeros((64, D)), xs)[0]

    wanted = {(path, role): 1 for path in "ab" for role in GRADIENTS}
    del wanted["b", "dgrad"]
    assert found(by_grad(recurrent), AB, jnp.stack([X, X])) == wanted
