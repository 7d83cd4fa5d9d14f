"""What the transform itself costs: a first call's analysis, later calls' dispatch."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import pytest

from fp8jax import recipes
from fp8jax.transform import fp8_transform

D = 128


def layers(count):
    w = jax.random.normal(jax.random.key(0), (D, D)) * 0.1
    return [{"w": w * (1 + i), "b": w[0]} for i in range(count)]


X = jax.random.normal(jax.random.key(1), (128, D))


def step(params, x):
    def loss(params):
        y = x
        for layer in params:  # Unrolled: every layer is in the program.
            y = y + jnp.tanh(y @ layer["w"] + layer["b"])
        return jnp.mean(jnp.square(y))

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), value


def anew():
    """The step as a function that JAX has not traced yet."""
    return functools.partial(step)


def seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


@pytest.mark.slow
def test_analysis_of_24_unrolled_layers_takes_under_a_tenth_of_compilation():
    args = layers(24), X

    def ratio():
        analysis = seconds(functools.partial(fp8_transform(anew()).report, *args))
        return analysis / seconds(fp8_transform(anew()).lower(*args).compile)

    # In turns, and the best: other programs slow down now one, now the other.
    assert min(ratio() for _ in range(6)) < 0.1


@pytest.mark.slow
def test_later_calls_take_at_most_a_fifth_longer_than_those_of_jit():
    params = layers(4)
    plain = functools.partial(jax.jit(step), params, X)
    # The same program, so that what differs is the way to it.
    wrapped = functools.partial(fp8_transform(step, recipes.bf16()), params, X)

    def ratio():
        pairs = [(seconds(plain), seconds(wrapped)) for _ in range(200)]
        plain_median, wrapped_median = map(statistics.median, zip(*pairs, strict=True))
        return wrapped_median / plain_median

    ratio()  # The first calls compile.
    assert min(ratio() for _ in range(3)) < 1.2


def test_one_signature_is_traced_and_compiled_once(caplog):
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return step(params, x)

    def compilations():
        said = [record.getMessage() for record in caplog.records]
        return sum("XLA compilation of jit(counted)" in message for message in said)

    fn = fp8_transform(counted)
    params = layers(1)
    with jax.log_compiles():
        for _ in range(3):
            params, _ = fn(params, X)
        assert (len(traces), compilations()) == (1, 1)
        fn.report(params, X)  # Traces, compiles nothing, and forgets nothing.
        params, _ = fn(params, X)
        assert (len(traces), compilations()) == (2, 1)
        fn(params, X[:64])
        assert (len(traces), compilations()) == (3, 2)
