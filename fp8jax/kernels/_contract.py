"""The signatures that every lowering of a kernel op has.

Kernels see arrays and static numbers only: no `QTensor`, no recipe, no autodiff. A
lowering that cannot do what it is asked raises NotImplementedError with the reason,
before it touches the data; `fp8jax._dispatch` then tries the next one.
"""

from typing import Literal, Protocol

import jax

from fp8jax._elementwise import Elementwise

Tile = tuple[int, int]
ScaleKind = Literal["pow2", "fp32"]

Quantized = tuple[jax.Array, jax.Array]  # Codes, and scales one a tile.
# Of a matrix, and of its transpose; None where it was not asked for.
Directions = tuple[Quantized | None, Quantized | None]


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
    ) -> Quantized: ...


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
    ) -> tuple[Quantized, Quantized]: ...


class QuantizeSwiglu(Protocol):
    """`h = silu(gate) * up`, quantized; `gate` and `up` `[m, k]` of one dtype.

    h is computed in float32 as `fp8jax.kernels._swiglu` spells it, and rounded to the
    dtype of `gate`: the codes are those of an h that was written and read again, and
    the same numbers in both directions. Returns a tuple of what `QuantizeBoth` does of
    h, with None in place of a direction whose tile is None.

    A NaN or an infinity in h makes its tile NaN; so does an infinite gate.
    """

    def __call__(
        self,
        gate: jax.Array,
        up: jax.Array,
        *,
        tile: Tile | None,
        tile_t: Tile | None,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> tuple[Directions]: ...


class QuantizeSwigluGradient(Protocol):
    """The gradients of `QuantizeSwiglu`'s h to gate and up, given `dh [m, k]`.

    Computed, rounded and quantized as h is there: `dgate`'s directions, then `dup`'s.
    """

    def __call__(
        self,
        dh: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        *,
        tile: Tile | None,
        tile_t: Tile | None,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> tuple[Directions, Directions]: ...


class QuantizeMap(Protocol):
    """Elementwise functions of matrices [m, k], quantized.

    `function` says what the inputs are: first matrices, of bfloat16, float16 or
    float32, then numbers per row [m, 1] and per column [1, k]. Each of its results is
    rounded to its dtype and quantized as `tiles` says: of it, and of its transpose,
    None for what is not asked for. Returns `Directions` for each.

    The lowerings differ in exponentials, roots and divisions by some units in the last
    place of float32, before a result is rounded.
    """

    def __call__(
        self,
        *inputs: jax.Array,
        function: Elementwise,
        tiles: tuple[tuple[Tile | None, Tile | None], ...],
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> tuple[Directions, ...]: ...


class QuantizeRmsNorm(Protocol):
    """`h = x / rms(x) * weight`, quantized; `x [m, k]`, `weight [k]`.

    With `r = rsqrt(mean(x^2) + epsilon)` of a row, in float32, h is `(x r) weight`
    rounded to the dtype of x. Returns what `Quantize` does of h, and r, float32 [m].
    r is NaN, and so is the row, where the sum of squares is no finite number.
    """

    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array,
        *,
        epsilon: float,
        tile: Tile,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> tuple[Quantized, jax.Array]: ...


class QuantizeAddRmsNorm(Protocol):
    """`QuantizeRmsNorm` of `x + residual`, both `[m, k]` of one dtype.

    The sum is rounded to that dtype first. Returned last, after what is there.
    """

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array,
        weight: jax.Array,
        *,
        epsilon: float,
        tile: Tile,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> tuple[Quantized, jax.Array, jax.Array]: ...


class Gemm(Protocol):
    """`lhs [m, k]` times `rhs [n, k]` transposed, FP32 promotion every 128 of k.

    `lhs_scale` and `rhs_scale` have one entry a tile: `ceil(shape / tile)`, where both
    tiles span 128 columns. `acc = fma(partial * lhs_scale * rhs_scale, acc)` for every
    chunk of 128, in order of k; the result is rounded once to `out_dtype`. With
    `accumulate`, float32 [m, n], that is float32 and added to it.
    """

    def __call__(
        self,
        lhs: jax.Array,
        lhs_scale: jax.Array,
        rhs: jax.Array,
        rhs_scale: jax.Array,
        accumulate: jax.Array | None = None,
        *,
        lhs_tile: Tile,
        rhs_tile: Tile,
        out_dtype: jax.typing.DTypeLike,
    ) -> jax.Array: ...


class GemmSwiglu(Protocol):
    """`h = silu(lhs gateᵀ) * (lhs upᵀ)` quantized; `gate` and `up` `[n, k]`.

    Both products are `Gemm`'s, rounded to `between`; h is `QuantizeSwiglu`'s of them.
    Returns `data [m, n]` and `scale [m, ceil(n / 128)]`, in tiles of (1, 128).
    """

    def __call__(
        self,
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
    ) -> Quantized: ...


class QuantizeGrouped(Protocol):
    """`x [m, k]`, whose rows lie in groups, and `x.T`, of which no tile spans two.

    `group_sizes`, int32 [g] in device memory, says how many rows each group has, the
    first group's first. Any may be 0, and rows may be left over. Returns what
    `Directions` names: the codes of x, as `Quantize` gives them in tiles of `tile`,
    all rows alike; None where `tile` is. Then those of x.T in tiles of `tile_t`, whose
    second side is 128, with every group in columns of its own:

        data_t [k, 128 c], scale_t [ceil(k / tile_t[0]), c],
        c = fp8jax.numerics.count_group_blocks(m, g, 128) = p + (m - p) // 128,
        p = min(g, m)

    Group i begins at column `128 * sum(ceil(group_sizes[:i] / 128))`. Its codes and
    scales are those of its own rows; columns that hold no row have zeros, and a tile
    with nothing else the scale 1.
    """

    def __call__(
        self,
        x: jax.Array,
        group_sizes: jax.Array,
        *,
        tile: Tile | None,
        tile_t: Tile,
        dtype: jax.typing.DTypeLike,
        scale: ScaleKind,
        eps: float,
    ) -> Directions: ...


class GroupedGemm(Protocol):
    """Each row of `lhs [m, k]` times its group's matrix of `rhs [g, n, k]`, transposed.

    Rows lie in groups as `group_sizes`, int32 [g], says. Scales of the lhs are as in
    `Gemm`, those of the rhs [g, ceil(n / rhs_tile[0]), ceil(k / 128)]. Row i of the
    result [m, n] is the row that `Gemm` gives for its group; rows of no group are zero
    whatever the lhs holds there.

    The bits are `Gemm`'s, too, but for XLA's: it may add a chunk in another order in a
    matrix of another size.
    """

    def __call__(
        self,
        lhs: jax.Array,
        lhs_scale: jax.Array,
        rhs: jax.Array,
        rhs_scale: jax.Array,
        group_sizes: jax.Array,
        *,
        lhs_tile: Tile,
        rhs_tile: Tile,
        out_dtype: jax.typing.DTypeLike,
    ) -> jax.Array: ...


class GroupedGemmK(Protocol):
    """For each group, `Gemm` of its own columns of `lhs [m, t]` and `rhs [n, t]`.

    Both are in the columns that `QuantizeGrouped` gives x.T, and `group_sizes`, int32
    [g], is what it took. Returns [g, m, n]; zeros for a group without rows. With
    `accumulate`, float32 [g, m, n], it is float32 and added to it.
    """

    def __call__(
        self,
        lhs: jax.Array,
        lhs_scale: jax.Array,
        rhs: jax.Array,
        rhs_scale: jax.Array,
        group_sizes: jax.Array,
        accumulate: jax.Array | None = None,
        *,
        lhs_tile: Tile,
        rhs_tile: Tile,
        out_dtype: jax.typing.DTypeLike,
    ) -> jax.Array: ...
