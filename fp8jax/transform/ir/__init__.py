"""Jaxprs: constructs, walks, dead code. Nothing here knows of FP8."""

from fp8jax.transform.ir._constructs import CONSTRUCTS, Construct, Input, Result
from fp8jax.transform.ir._dead_code import without_dead_code
from fp8jax.transform.ir._jaxprs import called, jaxprs_of, shardings_of, with_jaxprs
from fp8jax.transform.ir._splice import (
    casts_of_types,
    copied,
    moved_to,
    named_after,
    read,
    reading,
    splice,
)
from fp8jax.transform.ir._walk import (
    construct_of,
    equations,
    memoized,
    with_bodies,
    with_equations,
)

__all__ = [
    "CONSTRUCTS",
    "Construct",
    "Input",
    "Result",
    "called",
    "casts_of_types",
    "construct_of",
    "copied",
    "equations",
    "jaxprs_of",
    "memoized",
    "moved_to",
    "named_after",
    "read",
    "reading",
    "shardings_of",
    "splice",
    "with_bodies",
    "with_equations",
    "with_jaxprs",
    "without_dead_code",
]
