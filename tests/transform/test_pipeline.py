"""The list of passes: what runs, in which order, and that each can be switched off."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import fp8jax
from fp8jax import recipes
from fp8jax.transform import _pipeline, fp8_transform

ROOT = pathlib.Path(__file__).parents[2]
D, LAYERS = 128, 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


STACK = {"up": normal(0, LAYERS, D, 2 * D), "down": normal(1, LAYERS, 2 * D, D)}
X = normal(2, 64, D)


@jax.jit
def block(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def forward(stack, x, layer=block):
    return lax.scan(lambda x, w: (layer(w, x), None), x, stack)[0]


def step(stack, x, layer=block):
    def loss(stack):
        return jnp.mean(forward(stack, x, layer) ** 2)

    return jax.value_and_grad(loss)(stack)


def rematted(stack, x):
    return step(stack, x, jax.checkpoint(block))


@jax.custom_vjp
def ruled(w, x):
    return x @ w


ruled.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, dy: (r[1].T @ dy, dy @ r[0].T))


def with_rule(params, x):
    return ruled(params["up"], x) @ params["down"]


KEPT = recipes.deepseek_v3(residual="fp8")
LAYER = jax.tree.map(lambda w: w[0], STACK)
CASES = {
    "scan": (step, {}, STACK),
    "scan, remat": (rematted, {}, STACK),
    "scan, residuals in FP8": (step, {"recipe": KEPT}, STACK),
    "forward": (forward, {}, STACK),
    "a rule": (with_rule, {"custom_rules": ["ruled"]}, LAYER),
}


@functools.cache
def results(case, without=()):
    fn, options, params = CASES[case]
    return fp8_transform(fn, **options, without=without)(params, X)


@pytest.mark.parametrize("case", ["scan, remat", "scan, residuals in FP8", "a rule"])
@pytest.mark.parametrize("name", _pipeline.SAME_NUMBERS)
def test_passes_that_promise_so_change_no_number(name, case):
    chex.assert_trees_all_equal(results(case, (name,)), results(case))


def test_numbers_are_those_without_any_of_these_passes():
    without = tuple(_pipeline.SAME_NUMBERS)
    chex.assert_trees_all_equal(results("scan", without), results("scan"))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("inline", "scan"),
        ("carry", "scan, residuals in FP8"),
        ("hoist", "scan"),
        ("pair", "scan"),
        ("clean", "scan"),
    ],
)
def test_switched_off_pass_does_not_run(name, case, monkeypatch):
    fn, options, params = CASES[case]
    seen = []

    def spy(program):
        seen.append(program)
        return passed(program)

    passed = _pipeline.PASSES[name]
    monkeypatch.setitem(_pipeline.PASSES, name, spy)

    def text(without):
        fresh = functools.partial(fn)
        made = fp8_transform(fresh, **options, without=without).trace(params, X)
        return str(made.jaxpr)

    off = text((name,))
    assert not seen
    assert text(()) != off
    assert seen


def test_stored_weights_without_sink_are_read_as_arrays():
    spec = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")
    stored = jax.tree.map(lambda w: fp8jax.quantize(w, spec), STACK)

    def reasons(without):
        options = {"without": without, "weight_dtype": jnp.float32}
        report = fp8_transform(forward, **options).report(stored, X)
        return {row.reason for row in report.rows}

    assert reasons(()) == {"stored in FP8"}
    assert reasons("sink") != {"stored in FP8"}


@pytest.mark.parametrize(
    "without", [["hoits"], "replace", ("hoist", 3), 3, [["hoist"]]]
)
def test_names_of_no_pass_are_refused(without):
    allowed = ", ".join(_pipeline.OPTIONAL)
    with pytest.raises(
        ValueError, match=f"without=.* {allowed}, got {re.escape(repr(without))}"
    ):
        fp8_transform(step, without=without)


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", "docs/transform.md"])
def test_documents_list_the_passes_in_their_order(file):
    text = (ROOT / file).read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text[text.index("| pass |") :], re.M)
    assert listed == list(_pipeline.PASSES)
