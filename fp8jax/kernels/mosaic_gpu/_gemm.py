"""The FP8 GEMM: checks, padding and the block shape.

Two products go by the tiles of the right operand: 1d2d, 128x128 (fprop and dgrad), and
1d1d, 1x128 (wgrad, whose contraction runs over tokens). With the left operand in
128x128 tiles, 1d2d makes the transposed product and stores it turned around.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fp8jax import _compat
from fp8jax.kernels._contract import Tile
from fp8jax.kernels.mosaic_gpu._choose import choose_config
from fp8jax.kernels.mosaic_gpu._common import (
    in_32_bits,
    mapped_under_vmap,
    num_sms,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig, batch_config
from fp8jax.kernels.mosaic_gpu._gemm_kernel import gemm_padded
from fp8jax.kernels.mosaic_gpu._operands import (
    BLOCK,
    KINDS,
    ROW,
    check_operands,
    output_multiples,
    stored_dtype,
)
from fp8jax.kernels.mosaic_gpu._schedule import Batch, Dense

_TILES = ((ROW, BLOCK), (ROW, ROW), (BLOCK, ROW))  # Of (lhs, rhs).


def gemm(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    accumulate: jax.Array | None = None,
    *,
    lhs_tile: Tile,
    rhs_tile: Tile,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    r"""`lhs [m, k]` times `rhs [n, k]` transposed, on Hopper's FP8 tensor cores.

    $$acc \leftarrow fma(partial, s^l s^r, acc)$$

    for every chunk of 128 of k, in order, in float32; rounded once to `out_dtype`. A
    row of the result depends on no other row of `lhs`, nor on m. Every m, n and k from
    1 is taken; m and k that are no multiples of 8 and 128, and n that is none of 32,
    cost a zero-padded copy. Under vmap a batch of all operands is one launch.

    Args:
        lhs: FP8 [m, k], in tiles of `lhs_tile`: (1, 128), or (128, 128) with a rhs in
            (1, 128) (wgrad with x in blocks: 1d2d that stores its product transposed).
        lhs_scale: float32 [ceil(m / lhs_tile[0]), ceil(k / 128)].
        rhs: FP8 [n, k] of the same dtype, in tiles of `rhs_tile` = (128, 128) (1d2d:
            fprop, dgrad) or (1, 128) (1d1d: wgrad).
        rhs_scale: float32 [ceil(n / rhs_tile[0]), ceil(k / 128)].
        accumulate: float32 [m, n] to add the product to, in place where XLA need not
            keep it, and without a read of it where m and n need no padding. Before JAX
            0.11 it costs one more pass.
        lhs_tile: the tile of `lhs_scale`.
        rhs_tile: the tile of `rhs_scale`.
        out_dtype: bfloat16, float32 or float16.

    Returns:
        [m, n] of `out_dtype`.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Error: a tensor core's over 128 codes, which keeps at least 13 bits below the
    largest addend of each 32, and that of one float32 sum over the chunks.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    tiles = check_operands("gemm", lhs, rhs, (lhs_tile, rhs_tile), _TILES, out_dtype)
    lhs_tile, rhs_tile = tiles
    if accumulate is not None and not _compat.KERNELS_TAKE_REFS:
        product = functools.partial(
            gemm, lhs_tile=lhs_tile, rhs_tile=rhs_tile, out_dtype=out_dtype
        )
        return accumulate + product(lhs, lhs_scale, rhs, rhs_scale)
    stored = stored_dtype(out_dtype)
    run = _in_one_launch(
        functools.partial(
            multiply, lhs_tile=lhs_tile, rhs_tile=rhs_tile, out_dtype=stored
        )
    )
    added = () if accumulate is None else (accumulate,)
    return run(lhs, lhs_scale, rhs, rhs_scale, *added).astype(out_dtype)


def _in_one_launch(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run`, of batches, too, with a rule that makes batches of batches one batch."""

    def fold(*operands: jax.Array) -> jax.Array:
        *outer, b, _, _ = operands[0].shape
        if not outer:
            return mapped(*operands)
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in operands))
        return out.reshape(*outer, b, *out.shape[1:])

    mapped = mapped_under_vmap(run, fold)
    return mapped


@in_32_bits
def multiply(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    accumulate: jax.Array | None = None,
    *,
    rhs_tile: Tile,
    out_dtype: jax.typing.DTypeLike,
    lhs_tile: Tile = ROW,
    config: GemmConfig | None = None,
) -> jax.Array:
    """`gemm` of what the kernel takes, with a block shape of one's own choice.

    Args:
        lhs, lhs_scale, rhs, rhs_scale, accumulate, lhs_tile, rhs_tile: as in `gemm`,
            of one product or, with a first dimension more, of a batch.
        out_dtype: bfloat16 or float32.
        config: the block shape; None takes `choose_config`'s, of a batch
            `batch_config`'s.
    """
    run = functools.partial(
        _multiply, accumulate=accumulate, out_dtype=out_dtype, config=config
    )
    if lhs_tile[0] > 1:
        return run(rhs, rhs_scale, lhs, lhs_scale, lhs_tile, transposed=True)
    return run(lhs, lhs_scale, rhs, rhs_scale, rhs_tile)


def _multiply(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    rhs_tile: Tile,
    *,
    accumulate: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
    config: GemmConfig | None,
    transposed: bool = False,
) -> jax.Array:
    """Pads and launches: [m, n], or [n, m] where `transposed`, after a batch."""
    (*batch, m, k), n = lhs.shape, rhs.shape[-2]
    lhs_scale_rows, rhs_scale_rows, sms = True, rhs_tile[0] == 1, num_sms()
    kind, stored = KINDS[rhs_tile], jnp.dtype(out_dtype).name
    if config is None:
        config = (
            batch_config(kind, batch[0], m, n, k, sms)
            if batch
            else choose_config(kind, m, n, k, stored, sms)
        )
    if config.turned:
        lhs, lhs_scale, rhs, rhs_scale = rhs, rhs_scale, lhs, lhs_scale
        lhs_scale_rows, rhs_scale_rows = rhs_scale_rows, lhs_scale_rows
        (m, n), transposed = (n, m), not transposed
    rows, columns = output_multiples(m, n, transposed=transposed)
    if accumulate is not None:
        accumulate = _padded(
            accumulate, (columns, rows) if transposed else (rows, columns)
        )
    lhs, rhs = _padded(lhs, (rows, CHUNK)), _padded(rhs, (columns, CHUNK))
    sides = dict(zip("mnk", (lhs.shape[-2], rhs.shape[-2], lhs.shape[-1]), strict=True))
    out = gemm_padded(
        lhs,
        _of_rows(lhs_scale, rows) if lhs_scale_rows else lhs_scale,
        rhs,
        _of_rows(rhs_scale, columns) if rhs_scale_rows else rhs_scale,
        schedule=(
            Batch(**sides, config=config, groups=batch[0])
            if batch
            else Dense(**sides, config=config)
        ),
        out_dtype=out_dtype,
        num_sms=sms,
        lhs_scale_rows=lhs_scale_rows,
        rhs_scale_rows=rhs_scale_rows,
        transposed=transposed,
        accumulate=accumulate,
    )
    return out[..., :n, :m] if transposed else out[..., :m, :n]


def _of_rows(scale: jax.Array, multiple: int) -> jax.Array:
    """Scales [m, k / 128], also of a batch, as [k / 128, m], the entries side by side.

    The quantization kernel writes them so: XLA cancels the transposes.
    """
    scale = _padded(scale, (multiple, 1))
    return scale.reshape(-1, scale.shape[-1]).T


def _padded(x: jax.Array, multiples: tuple[int, int]) -> jax.Array:
    return zero_pad(x, (*[1] * (x.ndim - 2), *multiples))
