"""What rules match and reports show: arguments, boxes, scopes of lists of arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fp8jax.recipes import Rule
from fp8jax.transform import fp8_transform

D, ROWS = 128, 64


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = normal(9, ROWS, D)
G, C = ([{"w": normal(i, D, D)}] for i in range(2))


def adversarial(g, d, x):
    def loss(both):
        g, d = both
        return jnp.mean(jnp.square(jnp.tanh(x @ g[0]["w"]) @ d[0]["w"]))

    return jax.grad(loss)((g, d))


def rows_of(report, status="fp8"):
    return {(r.path, r.role) for r in report.rows if r.status == status}


def test_weights_of_one_path_in_two_arguments_are_told_apart():
    every = rows_of(fp8_transform(adversarial).report(G, C, X))
    first = {("g/0/w", "fprop"), ("g/0/w", "wgrad")}
    second = {("d/0/w", role) for role in ("fprop", "wgrad", "dgrad")}
    assert every == first | second
    _, stats = fp8_transform(adversarial, stats=True)(G, C, X)
    assert set(stats) == {"g/0/w", "d/0/w"}


@pytest.mark.parametrize(
    ("pattern", "left"), [("d/0/w", 1), ("d/.*", 1), ("0/w", 2), (".*/w", 2)]
)
def test_rule_may_be_about_an_argument_or_about_a_path_in_any(pattern, left):
    fp8 = fp8_transform(adversarial, rules=[Rule(pattern, None)])
    skipped = rows_of(fp8.report(G, C, X), "skipped")
    expected = {"d/0/w"} if left == 1 else {"d/0/w", "g/0/w"}
    assert {path for path, _ in skipped} == expected


def test_default_skips_are_about_paths_and_not_about_names_of_arguments():
    def step(head, x):
        return jax.grad(lambda head: jnp.mean((x @ head["w"]) ** 2))(head)

    assert fp8_transform(step).report({"w": G[0]["w"]}, X).fraction == 1


def test_head_of_one_argument_is_no_head_in_another_of_the_same_path():
    def step(body, top, tokens, labels):
        def loss(both):
            body, top = both
            logits = jnp.tanh(tokens @ body["w"]) @ top["w"]
            picked = jnp.take_along_axis(logits, labels[:, None], 1)
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked[:, 0])

        return jax.grad(loss)((body, top))

    labels = jnp.arange(ROWS) % D
    report = fp8_transform(step).report(G[0], C[0], X, labels)
    assert {path for path, _ in rows_of(report)} == {"body/w"}
    assert {path for path, _ in rows_of(report, "skipped")} == {"top/w"}


@pytest.mark.parametrize("boxed", [False, True])
def test_boxed_parameters_of_linen_have_the_paths_of_plain_ones(boxed):
    init = nn.initializers.lecun_normal()
    init = nn.with_partitioning(init, (None, "model")) if boxed else init
    net = nn.Sequential([nn.Dense(D, kernel_init=init) for _ in range(2)])
    variables = net.init(jax.random.key(0), X)

    def step(variables, x):
        return jax.grad(lambda v: jnp.mean(net.apply(v, x) ** 2))(variables)

    fp8 = fp8_transform(step, rules=[Rule("params/layers_0/kernel", None)])
    report = fp8.report(variables, X)
    assert {path for path, _ in rows_of(report, "skipped")} == {
        "params/layers_0/kernel"
    }
    assert {path for path, _ in rows_of(report)} == {"params/layers_1/kernel"}
    assert not report.unmatched_rules


@pytest.mark.parametrize("key", [None, "trainable"])
@pytest.mark.parametrize("remat", [False, True])
def test_lists_of_arrays_are_known_by_the_scopes_of_their_products(remat, key):
    """As of Keras, which hands a model's variables over as a list."""

    def forward(variables, x):
        variables = variables[key] if key else variables
        for i, w in enumerate(variables):
            with jax.named_scope(f"model/dense_{i}"):
                x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    forward = jax.checkpoint(forward) if remat else forward
    rules = [Rule("model/dense_1", None, "kept")]
    fp8 = fp8_transform(jax.grad(forward), rules=rules)
    variables = [G[0]["w"], C[0]["w"], X.T @ X]
    report = fp8.report({key: variables} if key else variables, X)
    skipped = {(r.path, r.reason) for r in report.rows if r.status == "skipped"}
    assert skipped == {(f"{key}/1" if key else "1", "rule: kept")}
    roles = {role for path, role in rows_of(report, "skipped")}
    assert roles == {"fprop", "wgrad", "dgrad", *(["recompute"] if remat else [])}
    assert not report.unmatched_rules
