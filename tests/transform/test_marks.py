"""Our own jitted functions are known by a name that no function of the user has."""

import functools
import keyword

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

import fp8jax
from fp8jax import _compat, ops
from fp8jax.transform import fp8_transform
from fp8jax.transform.ir import jaxprs_of, without_dead_code

D = 128
W = jax.random.normal(jax.random.key(0), (D, D)) * 0.1
X = jax.random.normal(jax.random.key(1), (64, D))


def marks(jaxpr):
    """What the marked calls in a program are called, nested ones too."""
    found = []
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        mark = ops.mark_of(eqn)
        found += [] if mark is None else [mark]
        for sub in jaxprs_of(eqn):
            found += marks(sub)
    return found


def named(name, function):
    def run(*args):
        return function(*args)

    run.__name__ = run.__qualname__ = name
    return jax.jit(run)


def dead_code_by_jax(jaxpr):
    inner = _compat.open_jaxpr(jaxpr)
    return partial_eval.dce_jaxpr(inner, [True] * len(inner.outvars))[0]


def loss(params, x):
    return jnp.mean(jnp.square(x @ params["w"]))


# Names that others' functions may well have, and one that is set by hand.
NAMES = [
    "train",
    "fp8jax_step",
    "fp8jax_quantize",
    "fp8jax_fprop",
    "fp8jax_dequantize_128x128",
    "fp8jax_statistics",
    "fp8jax",
    "fp8jax::mine",
]


@pytest.mark.parametrize("name", NAMES)
def test_step_or_layer_of_any_name_is_in_fp8_and_has_its_bits(name):
    step = named(name, jax.grad(loss))
    assert fp8_transform(step).report({"w": W}, X).fraction == 1.0
    layer = named(name, lambda w, x: x @ w)
    forward = fp8_transform(lambda params, x: layer(params["w"], x))
    assert forward.report({"w": W}, X).fraction == 1.0
    wanted = fp8_transform(lambda params, x: x @ params["w"])({"w": W}, X)
    assert jnp.array_equal(forward({"w": W}, X), wanted)
    # With statistics, whose calls are found by their names.
    _, stats = fp8_transform(step, stats=True)({"w": W}, X)
    assert set(stats["w"]) == {"fprop", "wgrad"}


def test_mark_is_no_name_of_a_def_and_says_whose_it_is():
    assert not f"{ops.MARK}quantize".isidentifier()
    assert not keyword.iskeyword(ops.MARK)
    assert ops.MARK.startswith("fp8jax")


def layer(x, w):
    return fp8jax.dot_general(x, w, (((1,), (0,)), ((), ())))


def of(function, *args):
    with _compat.remat_as_jaxpr():
        return marks(jax.make_jaxpr(function)(*args))


FORWARD = of(layer, X, W)


def test_jit_keeps_the_mark():
    assert "gemm_xla" in FORWARD
    assert of(jax.jit(layer), X, W) == FORWARD


def test_derivatives_keep_the_mark():
    gradient = of(jax.grad(lambda x, w: jnp.sum(layer(x, w)), (0, 1)), X, W)
    assert gradient.count("gemm_xla") == 3


def test_vmap_keeps_the_mark():
    assert of(jax.vmap(layer, (0, None)), jnp.stack([X, X]), W) == FORWARD


def test_remat_keeps_the_mark():
    remat = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(layer(x, w))))
    assert of(jax.grad(remat, (0, 1)), X, W).count("gemm_xla") == 4


def test_retracing_keeps_the_mark():
    again = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(layer)(X, W))
    assert of(again, X, W) == FORWARD


def test_scan_keeps_the_mark():
    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

    assert of(scanned, X, jnp.stack([W, W])) == FORWARD


@pytest.mark.parametrize("eliminated", [dead_code_by_jax, without_dead_code])
def test_dead_code_elimination_keeps_the_mark_of_what_is_read(eliminated):
    both = ops.marked("both", lambda x: (jnp.sin(x), jnp.cos(x)))
    unread = ops.marked("unread", jnp.tan)

    def run(x):
        unread(x)
        return both(x)[0]

    jaxpr = jax.make_jaxpr(run)(X)
    assert marks(jaxpr) == ["unread", "both"]
    assert marks(eliminated(jaxpr)) == ["both"]


def test_twice_transformed_is_once_transformed():
    step = jax.value_and_grad(loss)
    once = fp8_transform(step)
    twice = fp8_transform(once)
    assert {r.reason for r in twice.report({"w": W}, X).rows} == {"by fp8jax itself"}
    found = marks(twice.trace({"w": W}, X).jaxpr)
    assert (found.count("fprop"), found.count("wgrad")) == (1, 1)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_marked_calls_lower_for_every_platform(platform):
    step = jax.jit(fp8_transform(jax.value_and_grad(loss), implementation="xla"))
    traced = step.trace({"w": W}, X)
    text = traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)
    for mark in ("fprop", "wgrad", "quantize"):
        assert f"{ops.MARK}{mark}" in text


def test_marked_calls_are_exported_and_named_in_profiles():
    fn = fp8_transform(functools.partial(loss))
    exported = jax.export.export(jax.jit(fn))({"w": W}, X)
    assert jnp.array_equal(exported.call({"w": W}, X), fn({"w": W}, X))
    hlo = fn.lower({"w": W}, X).compile().as_text()
    assert f"jit({ops.MARK}dot_general)" in hlo
