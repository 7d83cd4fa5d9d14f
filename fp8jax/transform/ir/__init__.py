"""Jaxprs: constructs, walks, dead code. Nothing here knows of FP8."""

from fp8jax.transform.ir._constructs import Construct, Input, Result
from fp8jax.transform.ir._dead_code import without_dead_code
from fp8jax.transform.ir._jaxprs import jaxprs_of, with_jaxprs
from fp8jax.transform.ir._walk import (
    construct_of,
    equations,
    memoized,
    with_bodies,
    with_equations,
)

__all__ = [
    "Construct",
    "Input",
    "Result",
    "construct_of",
    "equations",
    "jaxprs_of",
    "memoized",
    "with_bodies",
    "with_equations",
    "with_jaxprs",
    "without_dead_code",
]
