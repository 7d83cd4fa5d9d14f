"""`fuse`: chains that only quantizations read are computed by the quantization."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fp8jax.transform.ir import equations
from fp8jax.transform.lower import QuantizeMap
from tests.transform.passes.small import (
    LENGTH,
    D,
    after,
    along_rows,
    normal,
    only,
    outline,
    replaced,
    same_bits,
)

X, Y, W, STACK = normal(0, D, D), normal(1, D, D), normal(2, D, D), normal(3, 3, D, D)
GAIN, ROWS = normal(4, D), jnp.abs(normal(5, D, 1)) + 1
PASSES = "pair", "fuse", "clean"
CAST = "convert_element_type"


def maps(program, jaxpr=None):
    """The fused calls of one jaxpr, and how many inputs of each kind they take."""
    found = []
    for eqn in equations(program.jaxpr if jaxpr is None else jaxpr):
        call = fused(program, eqn)
        if call is not None:
            found.append((call.function, eqn))
    return found


def fused(program, eqn):
    """The call of an equation, if it is a fused one."""
    call = program.calls.of(eqn)
    return call if isinstance(call, QuantizeMap) else None


def kinds(program, jaxpr=None):
    return [function.kinds for function, _ in maps(program, jaxpr)]


def test_what_only_a_quantization_reads_is_computed_there():
    def run(x, w):
        return jnp.tanh(x) @ w

    before = replaced(run, X, W)
    program = after(before, *PASSES)
    assert outline(program.jaxpr) == ["quantize", "quantize_map", "fprop"]
    (function, _), = maps(program)  # fmt: skip
    assert [step.name for step in function.steps] == ["tanh"]
    same_bits(before, program, X, W)


def test_rows_columns_and_constants():
    def run(x, rows, gain, w):
        return ((x * rows) * gain[None] * 0.5 + lax.broadcast(gain, (D,))) @ w

    before = replaced(run, X, ROWS, GAIN, W)
    program = after(before, *PASSES)
    (found,) = kinds(program)
    assert found[:2] == ("matrix", "rows")
    assert set(found[2:]) == {"columns"}
    same_bits(before, program, X, ROWS, GAIN, W)


def test_a_scalar_is_a_column():
    def run(x, s, w):
        return (x * s) @ w

    before = replaced(run, X, jnp.float32(3), W)
    program = after(before, *PASSES)
    assert kinds(program) == [("matrix", "columns")]
    same_bits(before, program, X, jnp.float32(3), W)


def test_values_of_the_same_matrices_are_made_together():
    """SwiGLU's h and its gradients: three values, each its own ways, one read."""

    def run(gate, up, dh, w):
        silu = jax.nn.silu(gate)
        h, dup = silu * up, dh * silu
        dgate = dh * up * jax.nn.sigmoid(gate) * (1 + gate - silu)
        return along_rows(h, w), dup @ w, along_rows(dup, w), dgate @ w

    roles = ["wgrad", "dgrad", "wgrad", "dgrad"]
    before = replaced(run, X, Y, W, W, roles=roles)
    program = after(before, *PASSES)
    (function, _), = maps(program)  # fmt: skip
    assert function.kinds == ("matrix",) * 3
    assert len(function.results) == 3
    assert "quantize_both" not in outline(program.jaxpr)
    same_bits(before, program, X, Y, W, W)


def test_what_something_else_reads_is_left():
    def run(x, w):
        y = jnp.tanh(x)
        return y @ w, y

    before = replaced(run, X, W)
    assert maps(after(before, *PASSES)) == []


def test_a_chain_begins_at_a_sum_that_is_read_on():
    """A residual: computed anyway, and one matrix instead of two."""

    def run(x, y, w):
        total = x + y
        return jnp.tanh(total) @ w + total

    before = replaced(run, X, Y, W)
    program = after(before, *PASSES)
    (function, _), = maps(program)  # fmt: skip
    assert [step.name for step in function.steps] == ["tanh"]
    same_bits(before, program, X, Y, W)


def test_a_chain_begins_at_the_fewest_bytes_of_what_is_read_on():
    """A norm of a residual: the float32 that it takes is the sum, cast."""

    def run(x, y, w):
        wide = (x + y).astype(jnp.float32)
        rows = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True))
        return (wide * rows).astype(x.dtype) @ w, wide * 2

    args = [x.astype(jnp.bfloat16) for x in (X, Y, W)]
    before = replaced(run, *args)
    program = after(before, *PASSES)
    (function, _), = maps(program)  # fmt: skip
    assert function.kinds == ("matrix", "rows")
    assert function.dtypes[0] == jnp.bfloat16
    names = ["convert_element_type", "mul", "convert_element_type"]
    assert [step.name for step in function.steps] == names
    same_bits(before, program, *args)


def test_what_another_chain_reads_is_computed_twice():
    def run(x, w):
        total = x * 2
        return jnp.tanh(total) @ w + total

    before = replaced(run, X, W)
    (function, _), = maps(after(before, *PASSES))  # fmt: skip
    assert [step.name for step in function.steps] == ["mul", "tanh"]


def test_chains_that_need_each_others_codes_stay_apart():
    def run(x, w):
        y = jnp.tanh(x) @ w
        return (jnp.tanh(x) * y) @ w

    before = replaced(run, X, W)
    program = after(before, *PASSES)
    assert len(maps(program)) == 2
    same_bits(before, program, X, W)


def test_order_follows_what_is_read():
    """The first product comes before one of the call's inputs; it moves behind."""

    def run(x, dy, w):
        h = jnp.tanh(x)
        first = along_rows(h * 2, w)
        dh = dy @ w
        return first, (dh * x) @ w

    before = replaced(run, X, Y, W, roles=["wgrad", "dgrad", "dgrad"])
    program = after(before, *PASSES)
    same_bits(before, program, X, Y, W)


@pytest.mark.parametrize("shape", [(100, D), (D, 96), (2, 64, D)])
def test_whole_blocks_alone_but_of_any_rank(shape):
    x = normal(6, *shape)
    w = normal(7, shape[-1], D)
    before = replaced(lambda x, w: jnp.tanh(x) @ w, x, w)
    program = after(before, *PASSES)
    assert len(maps(program)) == (len(shape) == 3)
    same_bits(before, program, x, w)


def in_batch(x, y):
    return lax.dot_general(x, y, (((2,), (1,)), ((0,), (0,))))


def test_batches_of_matrices():
    """Each entry's blocks; numbers per row or column would be a launch per entry."""
    x, w = jnp.stack([X, Y]), jnp.stack([W, X])

    def run(x, w):
        h = in_batch(jax.nn.silu(x), w.astype(jnp.bfloat16).astype(jnp.float32))
        return h + in_batch(x * GAIN, w)

    before = replaced(run, x, w)
    program = after(before, *PASSES)
    found = [call for eqn in equations(program.jaxpr) if (call := fused(program, eqn))]
    assert [call.function.steps[0].name for call in found] == ["logistic", CAST]
    assert {call.shape for call in found} == {(2, D, D)}
    same_bits(before, program, x, w)


@pytest.mark.parametrize("shape", [(2, 100, D), (2, D, 96)])
def test_entries_of_a_batch_have_whole_blocks(shape):
    x, w = normal(6, *shape), normal(7, 2, shape[-1], D)
    before = replaced(lambda x, w: in_batch(jnp.tanh(x), w), x, w)
    assert maps(after(before, *PASSES)) == []


def test_in_scans_and_through_nested_jits():
    silu = jax.jit(jax.nn.silu)

    def run(x, stack):
        return lax.scan(lambda x, w: (silu(x) @ w, None), x, stack)[0]

    before = replaced(run, X, STACK, weights=[1])
    program = after(before, "hoist", *PASSES)
    assert outline(program.jaxpr) == ["quantize", ("scan", ["quantize_map", "fprop"])]
    assert only(program.jaxpr, "scan").length == LENGTH
    same_bits(before, program, X, STACK)


def test_bfloat16_is_rounded_at_each_step():
    x, y, w = (a.astype(jnp.bfloat16) for a in (X, Y, W))

    def run(x, y, w):
        return (jax.nn.silu(x) * y) @ w

    before = replaced(run, x, y, w)
    program = after(before, *PASSES)
    (function, _), = maps(program)  # fmt: skip
    assert {step.dtype for step in function.steps} == {jnp.dtype(jnp.bfloat16)}
    same_bits(before, program, x, y, w)


def test_integers_and_masks_are_no_chains():
    def run(x, mask, w):
        return jnp.where(mask > 0, x, 0.0) @ w

    before = replaced(run, X, jnp.ones((D, D), jnp.int32), W)
    assert maps(after(before, *PASSES)) == []


def test_what_a_forward_pass_keeps_for_a_backward_pass_stays_as_it_is():
    def loss(w, x, other):
        return jnp.sum(jnp.sin(jnp.tanh(x @ other) @ w))

    step = jax.grad(loss, argnums=(0, 2))
    before = replaced(
        step, W, X, Y, roles=["fprop", "fprop", "wgrad", "dgrad", "wgrad"]
    )
    program = after(before, *PASSES)
    # Of tanh(...) fprop and wgrad have codes, in two passes. The gradients are chains
    # of the backward pass alone, which begin at what is kept.
    assert "quantize" in outline(program.jaxpr)
    for function, eqn in maps(program):
        assert not {step.name for step in function.steps} & {"tanh", "sin"}
        assert len(eqn.invars) <= 3
    same_bits(before, program, W, X, Y)
