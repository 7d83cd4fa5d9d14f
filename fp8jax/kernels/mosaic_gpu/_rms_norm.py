"""RMS normalization, normalized and quantized in one read of the rows.

A row of x [m, k] is k / 128 tiles, which lie behind one another: seen as [m k / 128,
128], a tile is a row of registers, and its maximum needs no shared memory. A CTA takes
as many rows of x at a time as fill 64 tiles. They stay in shared memory while the sum
of squares of each row of x is found from those of its tiles, so that x is read once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels._contract import Quantized, ScaleKind, Tile
from fp8jax.kernels.mosaic_gpu._common import (
    await_stores,
    called,
    ceil_div,
    in_32_bits,
    kernel_name,
    launcher,
    mapped_under_vmap,
    num_sms,
    swizzled,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._encode import (
    BLOCK,
    amax_bits,
    check_arguments,
    encode,
    scales,
)
from fp8jax.kernels.mosaic_gpu._rms_norm_config import (
    GRAIN,
    PART,
    RmsNormConfig,
    rms_norm_config,
)

_FEW_ROWS = 128


def quantize_rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    epsilon: float,
    tile: Tile,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[Quantized, jax.Array]:
    r"""FP8 of `x / rms(x) * weight`, a row at a time.

    $$r_i = (\textstyle\frac{1}{k} \sum_j x_{ij}^2 + \epsilon)^{-1/2}, \quad
    h_{ij} = rne_{dtype(x)}((x_{ij} r_i) w_j)$$

    in float32, and then `quantize` of h. A k that is no multiple of 128 (1024 where
    its tiles are many and odd) or a few rows too few cost a zero-padded copy of x.

    Args:
        x: bfloat16, float16 or float32 [m, k], k at most 16384.
        weight: [k] of any float dtype.
        epsilon: added to the mean of squares.
        tile: (1, 128).
        dtype, scale, eps: as in `quantize`.

    Returns:
        Codes [m, k] and scales [m, ceil(k / 128)], and float32 r [m].

    Raises:
        NotImplementedError: For other tiles, dtypes or longer rows.
    """
    name = "quantize_rms_norm"
    check_arguments(name, (x,), {"tile": tile}, ((1, BLOCK),), dtype)
    if rms_norm_config(x.shape[1]) is None:
        raise NotImplementedError(
            f"mosaic_gpu {name} takes rows of up to {2 * PART * BLOCK}, got {x.shape=}."
        )
    run = functools.partial(
        normalize_padded, epsilon=epsilon, dtype=jnp.dtype(dtype), kind=scale, eps=eps
    )
    return mapped_under_vmap(run)(x, weight)


def quantize_add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    *,
    epsilon: float,
    tile: Tile,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[Quantized, jax.Array, jax.Array]:
    """`quantize_rms_norm` of `x + residual`, rounded to the dtype of x, and that sum.

    In one launch, unless rows of float32 are longer than 8192.

    Args:
        x, residual: bfloat16, float16 or float32 [m, k], k at most 16384.
        weight, epsilon, tile, dtype, scale, eps: as in `quantize_rms_norm`.

    Returns:
        What `quantize_rms_norm` returns, and the sum [m, k].

    Raises:
        NotImplementedError: As `quantize_rms_norm` does.
    """
    name = "quantize_add_rms_norm"
    check_arguments(name, (x, residual), {"tile": tile}, ((1, BLOCK),), dtype)
    how: Any = {"epsilon": epsilon, "dtype": jnp.dtype(dtype), "eps": eps}
    if rms_norm_config(x.shape[1], x.dtype.itemsize, inputs=2) is None:
        total = x + residual
        return *quantize_rms_norm(total, weight, tile=tile, scale=scale, **how), total
    run = functools.partial(normalize_padded, kind=scale, **how)
    return mapped_under_vmap(run)(x, weight, residual)


@in_32_bits
def normalize_padded(
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array | None = None,
    *,
    epsilon: float,
    dtype: np.dtype,
    kind: ScaleKind,
    eps: float,
    config: RmsNormConfig | None = None,
) -> tuple[Any, ...]:
    """`quantize_rms_norm` with a configuration of one's own choice.

    With a residual, `quantize_add_rms_norm`.
    """
    (m, k), inputs = x.shape, [x]
    if residual is not None:
        inputs.append(residual)
    config = config or rms_norm_config(k, x.dtype.itemsize, inputs=len(inputs))
    assert config is not None  # The caller has checked it.
    chunks = config.chunks
    padded = (zero_pad(a, (config.rows, chunks * BLOCK)) for a in inputs)
    weight = weight if weight.dtype.itemsize in (2, 4) else weight.astype(jnp.float32)
    weights = zero_pad(weight, (chunks * BLOCK,)).reshape(chunks, BLOCK)
    if chunks % GRAIN:  # No place for a copy to begin in the next row of x.
        weights = jnp.tile(weights, (config.rows, 1))
    data, factors, inverse_rms, *sums = _launch(
        [a.reshape(-1, BLOCK) for a in padded],
        weights,
        k=k,
        epsilon=epsilon,
        dtype=dtype,
        kind=kind,
        eps=eps,
        config=config,
    )
    data = data.reshape(-1, chunks * BLOCK)[:m, :k]
    factors = factors.T if factors.ndim > 1 else factors.reshape(-1, chunks)
    factors = factors[:m, : ceil_div(k, BLOCK)]
    sums = [total.reshape(-1, chunks * BLOCK)[:m, :k] for total in sums]
    return (data, factors), inverse_rms[:m], *sums


def _launch(
    inputs: list[jax.Array],
    weights: jax.Array,
    *,
    dtype: np.dtype,
    config: RmsNormConfig,
    **static,
) -> list[jax.Array]:
    x, *others = inputs
    tiles = x.shape[0]  # Of 128, of all rows.
    steps = tiles // config.tiles
    held = config.parts * PART  # Tiles that shared memory holds.
    rows = steps * config.rows
    sides = rows, config.chunks * BLOCK
    # Of few rows in the GEMM's order: it takes longer, but no launch to turn them.
    scales_shape = (config.chunks, rows) if rows <= _FEW_ROWS else (tiles,)
    in_columns = BLOCK // x.dtype.itemsize
    run = launcher(
        functools.partial(_body, steps=steps, config=config, **static),
        kernel_name=kernel_name("quantize_rms_norm", sides=sides),
        out_type=[
            jax.ShapeDtypeStruct((tiles, BLOCK), dtype),
            jax.ShapeDtypeStruct(scales_shape, jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            *[jax.ShapeDtypeStruct((tiles, BLOCK), x.dtype) for _ in others],
        ],
        scratch_types={
            "in_smem": plgpu.SMEM(
                (len(inputs), config.stages, held, BLOCK),
                x.dtype,
                transforms=swizzled(in_columns, BLOCK),
            ),
            "weights_smem": plgpu.SMEM(
                (held, BLOCK),
                weights.dtype,
                transforms=swizzled(BLOCK // weights.dtype.itemsize, BLOCK),
            ),
            "codes_smem": plgpu.SMEM(
                (held, BLOCK), dtype, transforms=swizzled(BLOCK, BLOCK)
            ),
            "squares_smem": plgpu.SMEM((held,), jnp.float32),
            "inverse_smem": plgpu.SMEM((held,), jnp.float32),
            "scale_smem": plgpu.SMEM((held,), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=config.stages),
            "weights_full": plgpu.Barrier(
                num_arrivals=ceil_div(config.tiles, len(weights))
            ),
        },
        grid=(min(num_sms() * config.ctas_per_sm, steps),),
        grid_names=("grid",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return called(run, *inputs, weights)


def _body(
    *refs,
    steps: int,
    k: int,
    epsilon: float,
    kind: ScaleKind,
    eps: float,
    config: RmsNormConfig,
    in_smem,
    weights_smem,
    codes_smem,
    squares_smem,
    inverse_smem,
    scale_smem,
    full,
    weights_full,
) -> None:
    """One CTA: every grid-th step of `config.rows` rows of x."""
    inputs, (weights, *outputs) = refs[: in_smem.shape[0]], refs[in_smem.shape[0] :]
    data, scale_out, inverse_rms, *sums = outputs
    first, ctas = lax.axis_index("grid"), lax.axis_size("grid")
    tiles = config.tiles
    parts = [pl.ds(part * PART, PART) for part in range(config.parts)]

    def fetch(turn, stage) -> None:
        step = first + turn * ctas

        @pl.when(step < steps)
        def _copy():
            for number, x in enumerate(inputs):
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(step * tiles, tiles)],
                    in_smem.at[number, stage, pl.ds(0, tiles)],
                    full.at[stage],
                )

    for start in range(0, tiles, weights.shape[0]):  # Once for each row of x.
        plgpu.copy_gmem_to_smem(
            weights, weights_smem.at[pl.ds(start, weights.shape[0])], weights_full
        )
    for stage in range(config.stages):
        fetch(jnp.int32(stage), jnp.int32(stage))

    def normalize(info) -> None:
        (step,) = info.index
        stage = lax.rem(info.local_index, jnp.int32(config.stages))
        plgpu.barrier_wait(full.at[stage])
        source = in_smem.at[0, stage]
        held, whole = pl.ds(0, tiles), pl.ds(step * tiles, tiles)

        # Sums of squares, of the tiles.
        for part in parts:
            values = _load(source.at[part])
            if sums:
                rounded = (values + _load(in_smem.at[1, stage, part])).astype(
                    source.dtype
                )
                source[part] = rounded
                values = rounded.astype(jnp.float32)
            squares_smem[part] = jnp.sum(values * values, axis=1)
        plgpu.commit_smem()
        # The copies that still read what is written below.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for total in sums:
            plgpu.copy_smem_to_gmem(source.at[held], total.at[whole])

        @pl.when(info.local_index == 0)
        def _wait_for_weights():
            plgpu.barrier_wait(weights_full)

        for number, part in enumerate(parts):
            inverse = _inverse_rms(squares_smem, number, k, epsilon, config)
            inverse_smem[part] = inverse
            values = _load(source.at[part])
            over_columns = lax.broadcast_in_dim(inverse, values.shape, (0,))
            values = values * over_columns * _load(weights_smem.at[part])
            values = values.astype(source.dtype).astype(jnp.float32)
            bits = plgpu.layout_cast(amax_bits(values), plgpu.Layout.WGMMA.reduce(1))
            factor, reciprocal = scales(bits, kind, eps, data.dtype)
            codes_smem[part] = encode(values, factor, reciprocal, kind, data.dtype)
            scale_smem[part] = factor
        # Also the point where every warp has read its part of the stage.
        plgpu.commit_smem()
        by_tile = len(scale_out.shape) == 1
        if by_tile:
            plgpu.copy_smem_to_gmem(
                scale_smem.at[held], scale_out.at[whole], commit_group=False
            )
        plgpu.copy_smem_to_gmem(codes_smem.at[held], data.at[whole])
        for tile in () if by_tile else range(tiles):
            row, chunk = divmod(tile, config.chunks)
            scale_out[chunk, step * config.rows + row] = scale_smem[tile]
        for row in range(config.rows):
            inverse_rms[step * config.rows + row] = inverse_smem[row * config.chunks]
        if sums:  # The sum has left before its place is filled again.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        fetch(info.local_index + config.stages, stage)

    plgpu.nd_loop((steps,), collective_axes="grid")(normalize)
    await_stores()


def _inverse_rms(
    squares_smem, number: int, k: int, epsilon: float, config: RmsNormConfig
) -> jax.Array:
    """For each tile of a part, 1 / rms of the row of x that it belongs to.

    The sum over the tiles of a row is one over the columns of a table of tiles by
    tiles, in which others' count nothing: as many rows of x as there are take one
    pass, and what lies behind the last tile stays out.
    """
    held = config.parts * PART
    shape = (PART, held)
    layout = plgpu.Layout.WGMMA
    squares = _compat.mosaic_load(squares_smem, layout.reduce(0))
    table = lax.broadcast_in_dim(squares, shape, (1,))
    mine, other = (
        lax.div(
            plgpu.broadcasted_iota(jnp.int32, shape, side, layout=layout) + start,
            jnp.int32(config.chunks),
        )
        for side, start in ((0, jnp.int32(number * PART)), (1, jnp.int32(0)))
    )
    total = jnp.sum(jnp.where(mine == other, table, jnp.float32(0)), axis=1)
    inverse = lax.rsqrt(total * np.float32(1 / k) + np.float32(epsilon))
    # The inverse of an overflow would be a silent zero.
    return jnp.where(total < jnp.float32(math.inf), inverse, jnp.float32(math.nan))


def _load(ref) -> jax.Array:
    return _compat.mosaic_load(ref, plgpu.Layout.WGMMA).astype(jnp.float32)
