"""What the transform itself costs: a first call's analysis, later calls' dispatch."""

import functools
import gc
import sys

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


def calls(run):
    """Python functions that are called while it runs: as many in each run.

    Times would be those of whatever else the machine does.
    """
    count = 0

    def look(frame, event, arg):
        nonlocal count
        count += event == "call"

    gc.collect()  # Finalizers of what other tests left behind are none of it.
    gc.disable()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_analysis_grows_with_the_program_and_no_faster():
    fp8_transform(anew()).report(layers(2), X)  # Imports, and caches of JAX's.

    def analysis(count):
        args = layers(count), X
        return calls(functools.partial(fp8_transform(anew()).report, *args))

    six, twelve, twenty_four = map(analysis, (6, 12, 24))
    # Twelve layers more cost twice what six more do, to a twentieth.
    assert 0 < twenty_four - twelve < 2.1 * (twelve - six)


def test_analysis_calls_at_most_six_times_what_the_trace_does():
    args = layers(24), X
    for _ in range(2):  # Once for imports and caches.
        plain = calls(functools.partial(jax.jit(anew()).trace, *args))
        report = calls(functools.partial(fp8_transform(anew()).report, *args))
    # The trace itself is one of the six.
    assert plain < report < 6 * plain


@pytest.mark.parametrize("count", [4, 40])
def test_a_later_call_looks_at_each_argument_and_at_nothing_else(count):
    params = layers(count)
    wrapped = functools.partial(fp8_transform(step, recipes.bf16()), params, X)
    wrapped()
    leaves = len(jax.tree.leaves((params, X)))
    # Two for each array: its key in the cache of calls, and whether it is static. The
    # rest is the way from the call to the jitted step.
    assert calls(wrapped) <= 2 * leaves + 30


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
