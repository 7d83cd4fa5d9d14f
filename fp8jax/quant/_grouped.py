"""Rows in groups, as the products of a mixture of experts read them."""

import dataclasses

import jax

from fp8jax import _dispatch, numerics
from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._quantize import checked, quantize_for
from fp8jax.quant._spec import TILE_1X128, QuantSpec

_GROUP_TILE = 128  # Rows that a tile of the transposed codes spans.


def grouped_columns(rows: int, groups: int) -> int:
    """Columns of the transposed codes that `quantize_grouped` makes.

    `128 (p + (rows - p) // 128)` with `p = min(groups, rows)`: the fewest that hold
    every group in whole tiles of 128, whatever its size.
    """
    return _GROUP_TILE * numerics.count_group_blocks(rows, groups, _GROUP_TILE)


def quantize_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    spec: QuantSpec | None = TILE_1X128,
    spec_t: QuantSpec = TILE_1X128,
    *,
    implementation: str | None = None,
) -> tuple[QTensor | None, QTensor]:
    """`x [m, k]`, whose rows lie in groups, and x.T, of which no tile spans two groups.

    The first is `quantize(x, spec)`. In the second, columns are rows of x, and group i
    begins at column `128 * sum(ceil(group_sizes[:i] / 128))`: its codes and scales are
    those of `quantize_transposed` of its own rows. Columns between the groups and after
    the last one hold zeros. `fp8jax.matmul.grouped_wgrad` multiplies two of these.

    Args:
        x: `[m, k]` of any float dtype, the first group's rows first.
        group_sizes: int32 `[g]`, rows of each group; any may be 0. Their sum is at most
            m: what is left over is in no group, and not in the second result.
        spec: of x; None to leave it out.
        spec_t: of x.T, in tiles that span 128 columns.
        implementation: as in `quantize`.

    Returns:
        QTensors `[m, k]`, or None, and `[k, grouped_columns(m, g)]`.

    Raises:
        ValueError: If x is no matrix, `group_sizes` is none, or specs do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated: see `quantize`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    name = "quantize_grouped"
    asked = [spec_t] if spec is None else [spec, spec_t]
    x = checked(name, x, *asked)
    if x.ndim != 2:
        raise ValueError(f"{name} takes a matrix [m, k], got x.shape={x.shape}.")
    numerics.check_group_sizes(name, group_sizes)
    if spec_t.tile[1] != _GROUP_TILE:
        raise ValueError(
            f"{name} takes a spec_t with tiles of {_GROUP_TILE} along the rows of x, "
            f"which are columns of its codes, got spec_t.tile={spec_t.tile}."
        )
    if spec is not None and dataclasses.replace(spec, tile=spec_t.tile) != spec_t:
        return (
            quantize_for(name, x, spec, implementation),
            quantize_grouped(
                x, group_sizes, None, spec_t, implementation=implementation
            )[1],
        )
    along, across = _dispatch.call(
        name,
        x,
        group_sizes,
        implementation=implementation,
        tile=spec and spec.tile,
        tile_t=spec_t.tile,
        dtype=spec_t.dtype,
        scale=spec_t.scale,
        eps=spec_t.eps,
    )
    return (
        None if spec is None else QTensor(along[0], along[1], spec.tile),
        QTensor(across[0], across[1], spec_t.tile),
    )
