"""Two products of a few rows and the SwiGLU of them, straight to FP8, in one launch.

The GEMM's pipeline, with two matrices that share a block: one warpgroup multiplies by
gate, the other by up and hands its part over in shared memory. The first has then a
tile of 128 columns of h in its registers, and quantizes it. Decoding so saves a launch,
and the writing and reading of both products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels._contract import Quantized, ScaleKind, Tile
from fp8jax.kernels._swiglu import swiglu
from fp8jax.kernels.mosaic_gpu._common import (
    called,
    in_32_bits,
    kernel_name,
    launcher,
    mapped_under_vmap,
    num_sms,
    swizzled,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._config import CHUNK, gemm_swiglu_config
from fp8jax.kernels.mosaic_gpu._encode import amax_bits, encode, scales
from fp8jax.kernels.mosaic_gpu._fetch import fetch
from fp8jax.kernels.mosaic_gpu._gemm import gemm
from fp8jax.kernels.mosaic_gpu._multiply import multiply
from fp8jax.kernels.mosaic_gpu._operands import BLOCK, ROW
from fp8jax.kernels.mosaic_gpu._pipeline import (
    OPERAND,
    ring,
    split_warpgroups,
)
from fp8jax.kernels.mosaic_gpu._schedule import ROW_MULTIPLE, Paired
from fp8jax.kernels.mosaic_gpu._swiglu import quantize_swiglu

_MOST_ROWS = 64  # Of a block; with more, each product has enough to do by itself.
_PRODUCT = swizzled(CHUNK // 2, CHUNK)  # How one lies between warpgroups, in bfloat16.


def gemm_swiglu(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    gate: jax.Array,
    gate_scale: jax.Array,
    up: jax.Array,
    up_scale: jax.Array,
    *,
    lhs_tile: Tile,
    rhs_tile: Tile,
    between: jax.typing.DTypeLike,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> Quantized:
    r"""FP8 of `silu(lhs gateᵀ) * (lhs upᵀ)`.

    One launch for up to 64 rows and an n of whole tiles, with products rounded to
    bfloat16; otherwise `gemm` twice and `quantize_swiglu`.

    Args:
        lhs: FP8 [m, k].
        lhs_scale: float32 [m, ceil(k / 128)].
        gate, up: FP8 [n, k] of the same dtype.
        gate_scale, up_scale: float32 [ceil(n / 128), ceil(k / 128)].
        lhs_tile, rhs_tile: as in `gemm`.
        between: what the products are rounded to.
        dtype, scale, eps: of h, as in `quantize`.

    Returns:
        Codes [m, n] and scales [m, ceil(n / 128)].

    Raises:
        NotImplementedError: As `gemm` and `quantize_swiglu` do.

    Error: of the products that of `gemm`; of h that of `quantize_swiglu`.
    """
    operands = lhs, lhs_scale, gate, gate_scale, up, up_scale
    how: Any = {"dtype": jnp.dtype(dtype), "kind": scale, "eps": eps}
    in_one = (
        ((lhs_tile[0], lhs_tile[1]), (rhs_tile[0], rhs_tile[1])) == (ROW, BLOCK)
        and len(lhs) <= _MOST_ROWS
        and len(gate) % CHUNK == 0
        and jnp.dtype(between) == jnp.bfloat16
        and {lhs.dtype, gate.dtype, up.dtype} == {jnp.dtype(dtype)}
    )
    if in_one:
        return mapped_under_vmap(functools.partial(_multiply, **how))(*operands)
    run = functools.partial(
        gemm, lhs_tile=lhs_tile, rhs_tile=rhs_tile, out_dtype=between
    )
    products = run(lhs, lhs_scale, gate, gate_scale), run(lhs, lhs_scale, up, up_scale)
    ((h, _),) = quantize_swiglu(
        *products, tile=ROW, tile_t=None, dtype=dtype, scale=scale, eps=eps
    )
    assert h is not None
    return h


@in_32_bits
def _multiply(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    gate: jax.Array,
    gate_scale: jax.Array,
    up: jax.Array,
    up_scale: jax.Array,
    *,
    dtype: np.dtype,
    **how: Any,
) -> Quantized:
    """Pads, launches, and cuts the padding off."""
    m, n = len(lhs), len(gate)
    lhs = zero_pad(lhs, (ROW_MULTIPLE, CHUNK))
    gate, up = (zero_pad(w, (1, CHUNK)) for w in (gate, up))
    rows, k = lhs.shape
    config = gemm_swiglu_config(k)
    schedule = Paired(m=rows, n=n, k=k, config=config)
    results = {
        "up_smem": plgpu.SMEM(
            (config.block_m, CHUNK),
            jnp.bfloat16,
            transforms=_PRODUCT,
        ),
        "codes_smem": plgpu.SMEM((config.block_m, CHUNK), dtype, transforms=OPERAND),
        "scale_smem": plgpu.SMEM((config.block_m,), jnp.float32),
    }
    launch = launcher(
        functools.partial(_body, schedule=schedule, **how),
        kernel_name=kernel_name("gemm_swiglu", sides=(rows, n, k)),
        out_type=(
            jax.ShapeDtypeStruct((rows, n), dtype),
            jax.ShapeDtypeStruct((n // CHUNK, rows), jnp.float32),
        ),
        scratch_types={
            **ring(config, lhs.dtype, rhs_parts=2, results=results),
            "given": plgpu.Barrier(),
            "taken": plgpu.Barrier(),
        },
        grid=(min(num_sms(), schedule.most),),
        grid_names=("grid",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # As where SwiGLU is quantized by itself.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    scale = zero_pad(lhs_scale.T, (1, ROW_MULTIPLE))
    data, factors = called(launch, lhs, scale, gate, gate_scale, up, up_scale)
    return data[:m], factors.T[:m]


def _body(
    lhs,
    lhs_scale,
    gate,
    gate_scale,
    up,
    up_scale,
    data,
    scale_out,
    *,
    schedule: Paired,
    kind: ScaleKind,
    eps: float,
    up_smem,
    codes_smem,
    scale_smem,
    given,
    taken,
    **scratch,
) -> None:
    """Splits the warpgroups: one multiplies by gate, one by up, one fetches."""
    rows = pl.ds(0, lhs.shape[0])

    def store(acc, wg, row, column, block) -> None:
        del row, column
        (sums,) = acc
        product = sums.astype(jnp.bfloat16)

        @pl.when(wg == 1)
        def _give():
            plgpu.barrier_wait(taken)
            _compat.mosaic_store(up_smem, product, plgpu.Layout.WGMMA, _PRODUCT)
            plgpu.commit_smem()
            plgpu.barrier_arrive(given)

        @pl.when(wg == 0)
        def _quantize():
            plgpu.barrier_wait(given)
            upped = _compat.mosaic_load(up_smem, plgpu.Layout.WGMMA)
            (h,) = swiglu(product.astype(jnp.float32), upped.astype(jnp.float32))
            plgpu.barrier_arrive(taken)
            h = h.astype(jnp.bfloat16).astype(jnp.float32)
            per_row = plgpu.Layout.WGMMA.reduce(1)
            bits = plgpu.layout_cast(amax_bits(h), per_row)
            factor, reciprocal = scales(bits, kind, eps, data.dtype)
            codes = encode(h, factor, reciprocal, kind, data.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            _compat.mosaic_store(codes_smem, codes, plgpu.Layout.WGMMA, OPERAND)
            _compat.mosaic_store(scale_smem, factor, per_row)
            plgpu.commit_smem()
            tile = lax.div(block.column, jnp.int32(CHUNK))
            plgpu.copy_smem_to_gmem(
                scale_smem.at[rows], scale_out.at[tile, rows], commit_group=False
            )
            plgpu.copy_smem_to_gmem(
                codes_smem.at[rows], data.at[rows, pl.ds(block.column, CHUNK)]
            )

    def math() -> None:
        @pl.when(lax.axis_index("wg") == 0)
        def _nothing_to_take():
            plgpu.barrier_arrive(taken)

        factors = gate_scale, up_scale
        multiply(lhs_scale, factors, (), schedule, schedule.config, store, **scratch)

        @pl.when(lax.axis_index("wg") == 1)
        def _last_is_taken():
            plgpu.barrier_wait(taken)

    def memory() -> None:
        rhs, config = (gate, up), schedule.config
        fetch(lhs, lhs_scale, rhs, None, (), schedule, config, **scratch)

    split_warpgroups(schedule.config, math, memory)
