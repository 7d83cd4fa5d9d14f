"""A program that is not in FP8 is told from one that is."""

import re

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax.testing import _lowered

PARAMS = {"w": jnp.ones((128, 128))}
X = jnp.ones((8, 128))


def step(params, x):
    return jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p["w"])))(params)


def test_transformed_step_passes_lowered_and_compiled():
    lowered = fp8jax.fp8_transform(step).lower(PARAMS, X)
    fp8jax.assert_fp8_lowered(lowered)
    fp8jax.assert_fp8_lowered(lowered.compile())


def test_plain_step_fails_and_the_error_counts_its_products():
    with pytest.raises(AssertionError, match=r"no FP8 array .* cpu, but \d+ plain"):
        fp8jax.assert_fp8_lowered(jax.jit(step).lower(PARAMS, X))


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"Compiled or Lowered.*function"):
        fp8jax.assert_fp8_lowered(step)


QUANTIZE = (
    "  %q = (f8e4m3fn[128,128]{1,0}, f32[128,1]{1,0}) custom-call(%x), "
    'custom_call_target="mosaic_gpu_v2"\n'
    "  %codes = f8e4m3fn[128,128]{1,0} get-tuple-element(%q), index=0\n"
)
GEMM = (
    "  ROOT %y = bf16[128,128]{1,0} custom-call(OPERANDS), custom_call_target=TARGET\n"
)


def gemm(operands, target):
    return GEMM.replace("OPERANDS", operands).replace("TARGET", f'"{target}"')


@pytest.mark.parametrize("operands", ["%codes, %s", "f8e4m3fn[128,128]{1,0} %c, %s"])
def test_gpu_program_with_a_kernel_that_reads_codes_passes(operands):
    text = QUANTIZE + gemm(operands, "mosaic_gpu_v2")
    assert _lowered._obstacle(text, "gpu") == ""


@pytest.mark.parametrize(
    ("operands", "target"), [("%codes", "__cublas$gemm"), ("%x", "mosaic_gpu_v2")]
)
def test_gpu_program_that_only_quantizes_in_a_kernel_fails(operands, target):
    obstacle = _lowered._obstacle(QUANTIZE + gemm(operands, target), "gpu")
    assert re.search(r"none of its [12] Mosaic kernels reads", obstacle)
    assert target in obstacle
