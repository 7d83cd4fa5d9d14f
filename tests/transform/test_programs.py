"""The script that compares programs sees what differs, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

from fp8jax import ops
from tests.transform import programs

X = jnp.ones((8, 8))


def text(function):
    return programs.text_of(jax.make_jaxpr(function)(X))


def chain(mark, *functions, dead=False):
    def run(x):
        for function in functions:
            x = function(x)
        if dead:
            jnp.exp(x)
        return ops.marked(mark, lambda x: x + 1)(x)

    return run


def test_names_of_our_calls_and_dead_code_do_not_matter():
    wanted = text(chain("one", jnp.sin, jnp.cos))
    assert text(chain("other", jnp.sin, jnp.cos)) == wanted
    assert text(chain("one", jnp.sin, jnp.cos, dead=True)) == wanted


@pytest.mark.parametrize(
    "functions",
    [(jnp.cos, jnp.sin), (jnp.sin, jnp.tan), (jax.named_call(jnp.sin), jnp.cos)],
    ids=["order", "primitive", "scope"],
)
def test_what_is_computed_and_where_does(functions):
    assert text(chain("one", *functions)) != text(chain("one", jnp.sin, jnp.cos))


def test_every_program_has_a_name_of_its_own_and_traces():
    names = list(programs.PROGRAMS)
    assert len(names) > 25
    fn, args = programs.PROGRAMS["mlp_step"]()
    assert "fp8jax" in programs.text_of(fn.trace(*args).jaxpr)
