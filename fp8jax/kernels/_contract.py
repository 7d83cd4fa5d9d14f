"""The signatures that every lowering of a kernel op has.

Kernels see arrays and static numbers only: no `QTensor`, no recipe, no autodiff. A
lowering that cannot do what it is asked raises NotImplementedError with the reason,
before it touches the data; `fp8jax._dispatch` then tries the next one.
"""

from typing import Literal, Protocol

import jax

Tile = tuple[int, int]
ScaleKind = Literal["pow2", "fp32"]


class Quantize(Protocol):
    """`x [m, k]` to codes and scales, one scale a tile.

    Returns `data [m, k]` of `dtype` and float32 `scale [ceil(m / tile[0]),
    ceil(k / tile[1])]` with `x ~= data * scale`. What the numbers mean is in
    `fp8jax.numerics`; edge tiles are zero-padded, and a NaN or an infinity anywhere in
    a tile makes its scale NaN. With `transposed`, x.T is what is quantized: `data` is
    [k, m], and `tile` and scales are of it.
    """

    def __call__(
        self,
        x: jax.Array,
        *,
        tile: Tile,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
        transposed: bool = False,
    ) -> tuple[jax.Array, jax.Array]: ...


class QuantizeBoth(Protocol):
    """`x [m, k]` in tiles of `tile` and `x.T` in tiles of `tile_t`, in one read of x.

    Returns `data [m, k]` with its scales, then `data_t [k, m]` with its own, the bits
    that the two calls of `quantize` give.
    """

    def __call__(
        self,
        x: jax.Array,
        *,
        tile: Tile,
        tile_t: Tile,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]: ...


class Gemm(Protocol):
    """`lhs [m, k]` times `rhs [n, k]` transposed, FP32 promotion every 128 of k.

    `lhs_scale` and `rhs_scale` have one entry a tile: `ceil(shape / tile)`, where both
    tiles span 128 columns. `acc = fma(partial * lhs_scale * rhs_scale, acc)` for every
    chunk of 128, in order of k; the result is rounded once to `out_dtype`.
    """

    def __call__(
        self,
        lhs: jax.Array,
        lhs_scale: jax.Array,
        rhs: jax.Array,
        rhs_scale: jax.Array,
        *,
        lhs_tile: Tile,
        rhs_tile: Tile,
        out_dtype: jax.typing.DTypeLike,
    ) -> jax.Array: ...
