"""What a program computes: values, passes of a step, roles of products."""

from fp8jax.transform.analysis._devices import axes_of_program, spread_of_program
from fp8jax.transform.analysis._flow import Flow
from fp8jax.transform.analysis._frozen import multiplies_features
from fp8jax.transform.analysis._gradients import gradient_sizes, operands_of, sizes_of
from fp8jax.transform.analysis._phases import (
    JVP,
    OUTSIDE,
    TRANSPOSE,
    Pass,
    Passes,
    Phase,
)
from fp8jax.transform.analysis._ragged_form import ragged_of
from fp8jax.transform.analysis._readers import TABLE, Readers, skipped_for
from fp8jax.transform.analysis._residuals import residual_bytes
from fp8jax.transform.analysis._roles import (
    UNCLEAR,
    Assignment,
    Role,
    assign,
    is_whole_step,
)
from fp8jax.transform.analysis._rules import RULES, opaque
from fp8jax.transform.analysis._stored import Stored, StoredOperands
from fp8jax.transform.analysis._transposed import read_transposed
from fp8jax.transform.analysis._values import (
    MARKED,
    SIDES,
    Dot,
    HandWritten,
    Scope,
    Side,
    Value,
    other_side,
)
from fp8jax.transform.analysis._weight_flags import (
    Flags,
    add_results,
    flagged,
    inner_flags,
)
from fp8jax.transform.analysis._weights import parameters_of, weight_mask

__all__ = [
    "JVP",
    "MARKED",
    "OUTSIDE",
    "RULES",
    "SIDES",
    "TABLE",
    "TRANSPOSE",
    "UNCLEAR",
    "Assignment",
    "Dot",
    "Flags",
    "Flow",
    "HandWritten",
    "Pass",
    "Passes",
    "Phase",
    "Readers",
    "Role",
    "Scope",
    "Side",
    "Stored",
    "StoredOperands",
    "Value",
    "add_results",
    "assign",
    "axes_of_program",
    "flagged",
    "gradient_sizes",
    "inner_flags",
    "is_whole_step",
    "multiplies_features",
    "opaque",
    "operands_of",
    "other_side",
    "parameters_of",
    "ragged_of",
    "read_transposed",
    "residual_bytes",
    "sizes_of",
    "skipped_for",
    "spread_of_program",
    "weight_mask",
]
