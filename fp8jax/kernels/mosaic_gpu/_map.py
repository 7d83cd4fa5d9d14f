"""Elementwise functions, computed and quantized in one read of their inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._elementwise import FUNCTIONS, Elementwise
from fp8jax.kernels._contract import Directions, ScaleKind, Tile
from fp8jax.kernels._swiglu import sigmoid
from fp8jax.kernels.mosaic_gpu._blocks import quantize_directions
from fp8jax.kernels.mosaic_gpu._blocks_values import Format
from fp8jax.kernels.mosaic_gpu._common import in_float32
from fp8jax.kernels.mosaic_gpu._encode import BLOCK, check_arguments

_TILES = ((1, BLOCK), (BLOCK, BLOCK))
_MOST_BYTES = 8  # An element of all matrices: what shared memory holds, with codes.


def quantize_map(
    *inputs: jax.Array,
    function: Elementwise,
    tiles: tuple[tuple[Tile | None, Tile | None], ...],
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[Directions, ...]:
    """FP8 of an elementwise function's results, in one read of what it takes.

    Args:
        inputs: matrices [m, k] of bfloat16, float16 or float32, then numbers per row
            [m, 1] and per column [1, k] of any float dtype; m and k multiples of 128.
        function, tiles, dtype, scale, eps: as in `fp8jax.kernels.QuantizeMap`.

    Returns:
        For each result, codes [m, k] and scales, and those of its transpose, each if
        asked for.

    Raises:
        NotImplementedError: For other tiles, dtypes or sides, or more matrices than
            shared memory holds.

    Error: sums, differences and products are those of JAX, rounded at each step.
    Exponentials, logistic, roots and divisions are taken in float32, to some 20 bits,
    tanh to 17, and then rounded to the dtype of the step.
    """
    name = "quantize_map"
    count = function.kinds.count("matrix")
    matrices, vectors = inputs[:count], inputs[count:]
    for x in matrices:
        for i, (tile, tile_t) in enumerate(tiles):
            both = {f"tiles[{i}][0]": tile, f"tiles[{i}][1]": tile_t}
            check_arguments(name, (x,), both, _TILES, dtype)
    m, k = matrices[0].shape
    if m % BLOCK or k % BLOCK or not m or not k:
        raise NotImplementedError(
            f"mosaic_gpu {name} takes matrices of whole {BLOCK}x{BLOCK} blocks, got "
            f"[{m}, {k}]."
        )
    held = sum(x.dtype.itemsize for x in matrices)
    if held > _MOST_BYTES or len(function.results) > count:
        raise NotImplementedError(
            f"mosaic_gpu {name} takes matrices of at most {_MOST_BYTES} bytes an "
            f"element together, and no more results than matrices, got {held} bytes, "
            f"{count} matrices and {len(function.results)} results."
        )

    def compute(*pieces: jax.Array) -> tuple[jax.Array, ...]:
        as_given = (x.astype(d) for x, d in zip(pieces, function.dtypes, strict=True))
        return function(*as_given, functions=_IN_KERNEL)

    sides = (0 if kind == "rows" else 1 for kind in function.kinds[count:])
    numbers = (x.astype(jnp.float32).reshape(-1) for x in vectors)
    return quantize_directions(
        name,
        matrices,
        compute,
        function.result_dtypes,
        tiles,
        Format(jnp.dtype(dtype), scale, eps),
        list(zip(numbers, sides, strict=True)),
    )


def tanh(x: jax.Array) -> jax.Array:
    """Of float32 x, within 2^-17 of it, and within 2^-20 of 1 where it is near 1 or -1.

    Mosaic's own is one instruction, right to 11 bits: what is left of 1 + tanh(x) in
    GELU's tail would be noise.
    """
    square = x * x
    # Its series to x^7: within 2^-36 of it where x is small, as 2 sigmoid - 1 is not.
    terms = (np.float32(c) for c in (-17 / 315, 2 / 15, -1 / 3))
    factor = functools.reduce(lambda sum_, c: sum_ * square + c, terms)
    small = x + x * (square * factor)
    large = np.float32(2) * sigmoid(np.float32(2) * x) - np.float32(1)
    return jnp.where(jnp.abs(x) < np.float32(2.0**-4), small, large)


# Mosaic's own take float32, or are rounded in between.
_IN_KERNEL = {
    **FUNCTIONS,
    **{
        name: in_float32(function)
        for name, function in (
            ("div", lax.div),
            ("exp", lax.exp),
            ("exp2", lax.exp2),
            ("log", lax.log),
            ("logistic", sigmoid),
            ("rsqrt", lax.rsqrt),
            ("sqrt", lax.sqrt),
            ("tanh", tanh),
        )
    },
}
