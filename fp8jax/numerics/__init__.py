"""What an FP8 number means: formats, rounding, tiles, groups and error measures."""

from fp8jax.numerics._derivatives import no_derivative, refuse_derivatives
from fp8jax.numerics._errors import cosine_similarity, relative_error, sqnr_db
from fp8jax.numerics._formats import FP8_DTYPES, is_fp8, max_value
from fp8jax.numerics._groups import (
    GroupBlocks,
    check_group_sizes,
    count_group_blocks,
    group_blocks,
)
from fp8jax.numerics._rounding import (
    SMALLEST_SCALE,
    ScaleKind,
    decode_tiles,
    encode,
    integer_amax,
    round_to,
    round_up_pow2,
    scale_from_amax,
)
from fp8jax.numerics._sides import at_most, is_symbolic, may_be_one
from fp8jax.numerics._tiles import (
    Tile,
    expand_scale,
    join_tiles,
    scale_shape,
    split_tiles,
)

__all__ = [
    "FP8_DTYPES",
    "SMALLEST_SCALE",
    "GroupBlocks",
    "ScaleKind",
    "Tile",
    "at_most",
    "check_group_sizes",
    "cosine_similarity",
    "count_group_blocks",
    "decode_tiles",
    "encode",
    "expand_scale",
    "group_blocks",
    "integer_amax",
    "is_fp8",
    "is_symbolic",
    "join_tiles",
    "max_value",
    "may_be_one",
    "no_derivative",
    "refuse_derivatives",
    "relative_error",
    "round_to",
    "round_up_pow2",
    "scale_from_amax",
    "scale_shape",
    "split_tiles",
    "sqnr_db",
]
