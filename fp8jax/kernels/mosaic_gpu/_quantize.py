"""Fine-grained quantization: one pass over 128x128 blocks, codes and scales out.

A CTA is one warpgroup that walks blocks of 128x128 with the next ones in flight. A
block sits in registers in wgmma's layout, in which a row belongs to four threads: the
maximum of a tile needs no shared memory for 1x128, and the transposed read of the same
block serves 128x1, whose codes leave K-major ([k, m]) as the wgrad GEMM wants them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels._contract import ScaleKind, Tile
from fp8jax.kernels.mosaic_gpu._common import (
    ceil_div,
    in_32_bits,
    mapped_under_vmap,
    num_sms,
    swizzled,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._config import QuantizeConfig, quantize_config

BLOCK = 128  # Rows and columns of a block, and the longer side of every tile.
_TILES: tuple[Tile, ...] = ((1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK))
_IN_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))
_FP8_DTYPES = tuple(map(jnp.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2)))

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF_BITS = np.int32(0x7F800000)
_MANTISSA = np.int32((1 << 23) - 1)
# Exponent field of a power of two plus that of its reciprocal.
_RECIPROCAL = np.int32(254 << 23)
_SMALLEST_SCALE = np.float32(2.0**-126)


def quantize(
    x: jax.Array,
    *,
    tile: Tile,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    r"""`x [m, k]` to FP8 codes and one float32 scale a tile, in one pass.

    $$s = \max(\max(amax, eps) \cdot q_{max}^{-1}, 2^{-126}), \quad
    data = rne(x / s)$$

    with s rounded up to a power of two for `scale="pow2"`; 1 for a tile of zeros, NaN
    for a tile with a NaN or an infinity. Sides that are no multiple of 128 (k) or 8
    (m; 128 for tiles of 128 rows) cost a zero-padded copy.

    Args:
        x: bfloat16, float16 or float32 [m, k].
        tile: (1, 128), (128, 1) or (128, 128). For (128, 1) the kernel writes the codes
            as [k, m]; the transpose back is free where the caller transposes again.
        dtype: float8_e4m3fn or float8_e5m2.
        scale: "pow2" or "fp32".
        eps: floor of amax, in units of x.

    Returns:
        Codes [m, k] and scales [ceil(m / tile[0]), ceil(k / tile[1])].

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    tile = (tile[0], tile[1])
    if tile not in _TILES:
        raise NotImplementedError(
            f"mosaic_gpu quantize takes tiles of {_TILES}, got {tile=}."
        )
    if x.dtype not in _IN_DTYPES:
        raise NotImplementedError(
            f"mosaic_gpu quantize takes bfloat16, float16 or float32, got {x.dtype}."
        )
    if jnp.dtype(dtype) not in _FP8_DTYPES:
        raise NotImplementedError(
            "mosaic_gpu quantize returns float8_e4m3fn or float8_e5m2, got "
            f"dtype={jnp.dtype(dtype)}."
        )

    run = functools.partial(
        _quantize_matrix, tile=tile, dtype=jnp.dtype(dtype), kind=scale, eps=eps
    )

    def fold(batch: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if batch.ndim != 3 or batch.shape[1] % tile[0]:
            return None  # A tile would span two entries.
        b, m, k = batch.shape
        data, scales = call(batch.reshape(b * m, k))
        return data.reshape(b, m, k), scales.reshape(b, m // tile[0], -1)

    call = mapped_under_vmap(run, fold)
    return call(x)


@in_32_bits
def _quantize_matrix(
    x: jax.Array, *, tile: Tile, dtype: np.dtype, kind: ScaleKind, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Pads to what the copies need, launches, and cuts the padding off again."""
    m, k = x.shape
    rows, columns = ceil_div(m, tile[0]), ceil_div(k, tile[1])
    # The copies move whole rows of 8 and whole blocks of columns; transposed codes
    # have m as their contiguous side.
    x = zero_pad(x, (BLOCK if tile[1] == 1 else 8, BLOCK))
    data, scales = _launch(
        x,
        tile=tile,
        dtype=dtype,
        kind=kind,
        eps=eps,
        config=quantize_config(),
        sms=num_sms(),
    )
    if tile[0] == 1:
        scales = scales.T  # The kernel wrote [k / 128, m], m in whole blocks.
    if tile[1] == 1:
        data = data.T  # The kernel wrote [k, m].
    return data[:m, :k], scales[:rows, :columns]


def _launch(
    x: jax.Array,
    *,
    tile: Tile,
    dtype: np.dtype,
    kind: ScaleKind,
    eps: float,
    config: QuantizeConfig,
    sms: int,
) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    m_blocks, k_blocks = ceil_div(m, BLOCK), ceil_div(k, BLOCK)
    transposed = tile[1] == 1
    data = jax.ShapeDtypeStruct((k, m) if transposed else (m, k), dtype)
    # NOTE: whole blocks, because Mosaic stores a contiguous slice by a plain bulk copy,
    # which does not stop at the array's end as the tensor copies do.
    scales = {
        (1, BLOCK): (k_blocks, m_blocks * BLOCK),
        (BLOCK, 1): (m_blocks, k),
        (BLOCK, BLOCK): (m_blocks, k_blocks),
    }[tile]
    in_columns = BLOCK // x.dtype.itemsize  # 128 bytes, the widest swizzle.
    return plgpu.kernel(
        functools.partial(_body, tile=tile, kind=kind, eps=eps, stages=config.stages),
        out_type=(data, jax.ShapeDtypeStruct(scales, jnp.float32)),
        scratch_types={
            "x_smem": plgpu.SMEM(
                (config.stages, BLOCK, BLOCK),
                x.dtype,
                transforms=swizzled(in_columns, BLOCK),
            ),
            "data_smem": plgpu.SMEM(
                (BLOCK, BLOCK),
                dtype,
                transforms=swizzled(BLOCK, BLOCK),
            ),
            "scale_smem": plgpu.SMEM((BLOCK,), jnp.float32),
            "full": plgpu.Barrier(num_barriers=config.stages),
        },
        grid=(min(sms * config.ctas_per_sm, m_blocks * k_blocks),),
        grid_names=("grid",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(x)


def _body(
    x,
    data,
    scales,
    *,
    tile: Tile,
    kind: ScaleKind,
    eps: float,
    stages: int,
    x_smem,
    data_smem,
    scale_smem,
    full,
) -> None:
    """One CTA: every grid-th block, row after row of blocks."""
    m_blocks, k_blocks = ceil_div(x.shape[0], BLOCK), ceil_div(x.shape[1], BLOCK)
    first, ctas = lax.axis_index("grid"), lax.axis_size("grid")
    num_blocks = m_blocks * k_blocks

    def fetch(step, stage) -> None:
        block = first + step * ctas

        @pl.when(block < num_blocks)
        def _copy():
            row, column = lax.div(block, k_blocks), lax.rem(block, k_blocks)
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(row * BLOCK, BLOCK), pl.ds(column * BLOCK, BLOCK)],
                x_smem.at[stage],
                full.at[stage],
            )

    for stage in range(stages):
        fetch(jnp.int32(stage), jnp.int32(stage))

    def quantize_block(info) -> None:
        (block,) = info.index
        row, column = lax.div(block, k_blocks), lax.rem(block, k_blocks)
        stage = lax.rem(info.local_index, jnp.int32(stages))
        plgpu.barrier_wait(full.at[stage])
        source = x_smem.at[stage]
        if tile[1] == 1:
            source = source.T
        values = _compat.mosaic_load(source, plgpu.Layout.WGMMA).astype(jnp.float32)
        codes, factor = _encode(values, tile, kind, eps, data.dtype)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        data_smem[...] = codes
        scale_smem[...] = factor
        # Also the point where every warp has read its part of the stage.
        plgpu.commit_smem()
        rows, columns = pl.ds(row * BLOCK, BLOCK), pl.ds(column * BLOCK, BLOCK)
        if tile[1] == 1:
            plgpu.copy_smem_to_gmem(data_smem, data.at[columns, rows])
            plgpu.copy_smem_to_gmem(scale_smem, scales.at[row, columns])
        else:
            plgpu.copy_smem_to_gmem(data_smem, data.at[rows, columns])
            if tile[0] == 1:
                plgpu.copy_smem_to_gmem(scale_smem, scales.at[column, rows])
            else:
                scales[row, column] = scale_smem[0]
        fetch(info.local_index + stages, stage)

    plgpu.nd_loop((num_blocks,), collective_axes="grid")(quantize_block)
    plgpu.wait_smem_to_gmem(0)


def _encode(
    values: jax.Array, tile: Tile, kind: ScaleKind, eps: float, dtype
) -> tuple[jax.Array, jax.Array]:
    """Codes [128, 128] of a block and scales [128], one a row (of all, in a block)."""
    # NaN > inf > finite: the maximum of bit patterns, because a float maximum may drop
    # a NaN.
    bits = lax.bitcast_convert_type(values, jnp.int32) & _MAGNITUDE
    amax = jnp.max(bits, axis=1)
    if tile == (BLOCK, BLOCK):
        amax = lax.broadcast_in_dim(jnp.max(amax), (BLOCK,), ())
    factor, inverse = _scale(amax, kind, eps, dtype)
    # No clip: |x| <= amax, so x / s passes the largest code by at most an ulp of
    # float32, which rounds back to it.
    if kind == "pow2":
        scaled = values * lax.broadcast_in_dim(inverse, values.shape, (0,))
    else:
        scaled = values / lax.broadcast_in_dim(factor, values.shape, (0,))
    return scaled.astype(dtype), factor


def _scale(
    amax_bits: jax.Array, kind: ScaleKind, eps: float, dtype
) -> tuple[jax.Array, jax.Array]:
    """Scales from the bits of amax, and for "pow2" their exact reciprocals."""
    amax = lax.bitcast_convert_type(amax_bits, jnp.float32)
    floored = jnp.maximum(amax, np.float32(eps)) if eps else amax
    inverse_max = np.float32(1.0 / float(jnp.finfo(dtype).max))
    scale = jnp.maximum(floored * inverse_max, _SMALLEST_SCALE)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    if kind == "pow2":
        bits = (bits + _MANTISSA) & ~_MANTISSA  # Carries into the exponent unless 2^e.
    bits = jnp.where(amax_bits == 0, np.float32(1).view(np.int32), bits)
    inverse = _RECIPROCAL - bits
    finite = amax_bits < _INF_BITS
    nan = jnp.float32(jnp.nan)
    scale = jnp.where(finite, lax.bitcast_convert_type(bits, jnp.float32), nan)
    inverse = jnp.where(finite, lax.bitcast_convert_type(inverse, jnp.float32), nan)
    return scale, inverse
