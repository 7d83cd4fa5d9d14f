"""Jaxprs: constructs, walks, dead code. Nothing here knows of FP8."""

from fp8jax.transform.ir._calls import Calls
from fp8jax.transform.ir._constructs import Construct
from fp8jax.transform.ir._crossings import Input, Result
from fp8jax.transform.ir._dead_code import without_dead_code
from fp8jax.transform.ir._equations import (
    PRODUCT,
    RAGGED,
    asks_what_is_differentiated,
    called_name,
    closes_over_arrays,
    dimension_numbers,
    entries_of,
    gathers_rows,
    is_cast,
    is_differentiated,
    is_product,
    output_channels,
    permutation,
    primitive_of,
    product_options,
    ragged_numbers,
    signature,
)
from fp8jax.transform.ir._jaxprs import called, jaxprs_of, shardings_of, with_jaxprs
from fp8jax.transform.ir._positions import Position, Replacer, rewrite_at
from fp8jax.transform.ir._splice import (
    casts_of_types,
    copied,
    moved_to,
    named_after,
    read,
    reading,
    splice,
    written_out,
)
from fp8jax.transform.ir._stacks import Stacks
from fp8jax.transform.ir._table import CONSTRUCTS
from fp8jax.transform.ir._types import AnyJaxpr, Atom, aval_of
from fp8jax.transform.ir._views import Views, chain_of, name_of, views_in
from fp8jax.transform.ir._walk import (
    construct_of,
    equations,
    memoized,
    with_bodies,
    with_equations,
)

__all__ = [
    "CONSTRUCTS",
    "PRODUCT",
    "RAGGED",
    "AnyJaxpr",
    "Atom",
    "Calls",
    "Construct",
    "Input",
    "Position",
    "Replacer",
    "Result",
    "Stacks",
    "Views",
    "asks_what_is_differentiated",
    "aval_of",
    "called",
    "called_name",
    "casts_of_types",
    "chain_of",
    "closes_over_arrays",
    "construct_of",
    "copied",
    "dimension_numbers",
    "entries_of",
    "equations",
    "gathers_rows",
    "is_cast",
    "is_differentiated",
    "is_product",
    "jaxprs_of",
    "memoized",
    "moved_to",
    "name_of",
    "named_after",
    "output_channels",
    "permutation",
    "primitive_of",
    "product_options",
    "ragged_numbers",
    "read",
    "reading",
    "rewrite_at",
    "shardings_of",
    "signature",
    "splice",
    "views_in",
    "with_bodies",
    "with_equations",
    "with_jaxprs",
    "without_dead_code",
    "written_out",
]
