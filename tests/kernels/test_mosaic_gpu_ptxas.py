"""What ptxas says of the GEMMs: that no product waits for one that it need not."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Of shapes whose config has two accumulators: dense, with a whole last stage and with a
# half one, rows in groups, and a contraction in groups, whose loop may run no time at
# all.
PROGRAM = """
import functools
import jax, jax.numpy as jnp
from fp8jax.kernels import mosaic_gpu

def compiled(kernel, lhs_tile, rhs_tile, lhs, rhs, *sizes):
    def scale(shape, tile):
        *batch, m, k = shape
        return [*batch, m // tile[0], k // tile[1]], jnp.float32

    args = [
        jax.ShapeDtypeStruct(*spec)
        for shape, tile in ((lhs, lhs_tile), (rhs, rhs_tile))
        for spec in ((shape, jnp.float8_e4m3fn), scale(shape, tile))
    ]
    args += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in sizes]
    tiles = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
    run = functools.partial(kernel, **tiles, out_dtype=jnp.float32)
    jax.jit(run).lower(*args).compile()

row, block = (1, 128), (128, 128)
compiled(mosaic_gpu.gemm, row, block, [4096, 2048], [4096, 2048])
compiled(mosaic_gpu.gemm, row, block, [4096, 1152], [4096, 1152])
compiled(mosaic_gpu.grouped_gemm, row, block, [4096, 2048], [4, 4096, 2048], [4])
compiled(mosaic_gpu.grouped_gemm_k, block, row, [4096, 8704], [4096, 8704], [4])
"""


@pytest.mark.gpu
def test_ptxas_inserts_no_wait():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("registers, used") == 4, done.stdout
    # "warpgroup.wait is injected in around line ... by compiler".
    assert "C7517" not in done.stdout, done.stdout
