"""A step that is not in FP8 where it seems it should be says so, and no other does."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from fp8jax import recipes
from fp8jax.transform import fp8_transform
from fp8jax.transform.analysis import _phase_flow, _phases

D = 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = normal(9, 64, D)
AB = {"a": normal(0, D, D), "b": normal(1, D, D)}


def mlp(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])


def step_of(forward):
    def step(params, *args):
        def loss(params):
            return jnp.mean(jnp.square(forward(params, *args)))

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    return step


def doubts_of(step, *args, **options):
    """What a call warns of, and what the report notes: the same."""
    fn = fp8_transform(step, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn(*args)
        fn(*args)
    said = [str(w.message) for w in caught if "See .report" in str(w.message)]
    notes = fn.report(*args).notes
    assert len(said) == len(notes)  # Once, though it is called twice.
    assert all(note in text for note, text in zip(notes, said, strict=True))
    return said


def test_gradients_taken_for_recomputations_are_warned_of(monkeypatch):
    # As if JAX named the backward pass in a way that nobody expects.
    read = _phases.Passes._read

    def misread(self, names):
        phase, marks = read(self, names)
        if phase == "backward" and names[-1].text != "tail":
            return "recompute", marks
        return phase, marks

    monkeypatch.setattr(_phases.Passes, "_read", misread)
    monkeypatch.setattr(_phase_flow.PhasesByFlow, "of", lambda self, phase, _: phase)

    def step(params, x):
        def loss(params):
            y = mlp(params, x)
            with jax.named_scope("tail"):
                return jnp.mean(jnp.square(y @ params["c"]))

        return jax.grad(loss)(params)

    params = {**AB, "c": AB["a"]}
    said = doubts_of(step, params, X)
    assert len(said) == 2
    assert "fprop of a, b is in FP8, but wgrad was not recognized" in said[0]
    assert "fprop of b is in FP8, but dgrad was not recognized" in said[1]
    assert doubts_of(step, params, X, weights=0) == said


def adapted(adapter, base, x):
    y = x @ base["w"] + jnp.tanh(x @ adapter["down"]) @ adapter["up"]
    return jnp.sin(y)


def test_frozen_base_is_named_with_its_share_and_the_input_is_not():
    base = {"w": normal(2, D, D)}
    adapter = {"down": normal(0, D, 8), "up": normal(1, 8, D)}
    step = step_of(adapted)
    # A product with w is 16 of those with `down` or `up`, and there are five: 16 / 21.
    said = doubts_of(step, adapter, base, X)
    assert len(said) == 1
    assert "1 products (76.2% of FLOPs) by args1/w" in said[0]
    assert "weights=" in said[0]
    rows = fp8_transform(step).report(adapter, base, X).rows
    reasons = [row.reason for row in rows if row.role == "other"]
    assert any("if args1/w were a parameter" in reason for reason in reasons)
    assert not any("args2" in reason for reason in reasons)
    # Told what is a parameter, it warns of nothing: the base has no gradient to lose.
    assert doubts_of(step, adapter, base, X, weights=[0, 1]) == []


def test_skipped_by_a_rule_of_the_user_or_of_ours_is_no_cause_for_doubt():
    def forward(params, frozen, x):
        x = x @ frozen["lm_head"] + x @ frozen["narrow"].T @ frozen["narrow"]
        return mlp(params, x @ frozen["chosen"])

    frozen = {"lm_head": AB["a"], "narrow": normal(3, 16, D), "chosen": AB["b"]}
    rules = [recipes.Rule("chosen")]
    assert doubts_of(step_of(forward), AB, frozen, X, rules=rules) == []


def embedded(params, tokens):
    x = jnp.tanh(params["embed"][tokens] @ params["a"])
    return x @ params["b"]


def frozen_layer(params, x):
    # Without a gradient: there is none to lose.
    a = jax.lax.stop_gradient(params["a"])
    return mlp({**params, "a": a}, x)


def attention(params, x):
    q, k = x @ params["a"], x @ params["b"]
    # As large as a gradient of either, for there are as many rows as columns.
    return jax.nn.softmax(q @ k.T) @ x


def graph(params, adjacency, x):
    return adjacency @ jnp.tanh(adjacency @ jnp.tanh(x @ params["a"]) @ params["b"])


def memory(params, batch):
    return jnp.tanh(batch["x"] @ params["a"]) @ batch["keys"].T @ batch["keys"]


SQUARE = normal(8, D, D)


@pytest.mark.parametrize(
    ("forward", "args"),
    [
        (mlp, (X,)),
        (jax.checkpoint(mlp), (X,)),
        (embedded, (jnp.zeros((2, 64), jnp.int32),)),
        (attention, (SQUARE,)),
        (jax.checkpoint(attention), (SQUARE,)),
        (graph, (SQUARE, SQUARE)),
        (memory, ({"x": X, "keys": SQUARE},)),
    ],
)
def test_ordinary_steps_are_not_doubted(forward, args):
    params = {**AB, "embed": normal(3, 32, D)} if forward is embedded else AB
    assert doubts_of(step_of(forward), params, *args) == []


def test_layer_that_is_told_to_be_a_parameter_and_frozen_is_not_doubted():
    assert doubts_of(step_of(frozen_layer), AB, X, weights=0) == []


def test_recipe_or_rule_without_a_gradient_is_not_doubted():
    assert doubts_of(step_of(mlp), AB, X, recipe=recipes.bf16_wgrad()) == []
    rules = [recipes.Rule("b", roles=("wgrad", "dgrad"))]
    assert doubts_of(step_of(mlp), AB, X, rules=rules) == []
