"""XLA compiles for H100s that are not there, with the kernels that would run there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from benchmarks import _h100, _hlo

pytestmark = pytest.mark.compiled


def product(x, w):
    lhs = fp8jax.quantize(x, fp8jax.TILE_1X128)
    rhs = fp8jax.quantize(w, fp8jax.BLOCK_128X128)
    return fp8jax.scaled_matmul(lhs, rhs)


def arguments(mesh):
    rows, whole = (NamedSharding(mesh, spec) for spec in (P("x"), P()))
    return (
        jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16, sharding=rows),
        jax.ShapeDtypeStruct((384, 256), jnp.bfloat16, sharding=whole),
    )


def test_product_for_one_gpu_is_three_kernels_and_for_the_cpu_none():
    text = _h100.compiled(jax.jit(product), *arguments(_h100.mesh(1)))
    program = _hlo.parse(text)
    kernels = _hlo.kernels(program)
    assert sum(kernel.is_quantization for kernel in kernels) == 2
    (gemm,) = (kernel for kernel in kernels if kernel.is_product)
    assert [array.shape for array in gemm.results] == [(1024, 384)]
    assert {(1024, 256), (384, 256)} <= {array.shape for array in gemm.operands}
    assert _hlo.emulated(program) == []
    # The same function, traced again, is chosen for this machine.
    x, w = (jnp.ones(a.shape, a.dtype) for a in arguments(_h100.mesh(1)))
    assert "mosaic_gpu" not in (jax.jit(product).lower(x, w).compile().as_text() or "")


def test_sum_over_eight_gpus_is_one_exchange_of_a_shards_size():
    def f(x, w):
        del w
        return jax.nn.relu(jnp.sum(x, axis=0, dtype=jnp.float32))

    text = _h100.compiled(jax.jit(f), *arguments(_h100.mesh(8)))
    (found,) = _hlo.collectives(_hlo.parse(text))
    assert (found.opcode, found.devices, found.times) == ("all-reduce", 8, 1)
    assert found.nbytes == 256 * 4
