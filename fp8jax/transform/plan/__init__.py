"""What becomes of every product, and what is said of it."""

from fp8jax.transform.plan._decisions import (
    Decision,
    LayerDot,
    QuantizedDot,
    StoredDot,
    specs_of,
)
from fp8jax.transform.plan._found_rules import found_rules
from fp8jax.transform.plan._plan import Plan, doubting, make_plan, with_doubts
from fp8jax.transform.plan._policy import Policy
from fp8jax.transform.plan._report import Report, Row
from fp8jax.transform.plan._rule_call import RuleCall
from fp8jax.transform.plan._splits import Splits
from fp8jax.transform.plan._statistics import named_statistics, plot_statistics
from fp8jax.transform.plan._warn import warn

__all__ = [
    "Decision",
    "LayerDot",
    "Plan",
    "Policy",
    "QuantizedDot",
    "Report",
    "Row",
    "RuleCall",
    "Splits",
    "StoredDot",
    "doubting",
    "found_rules",
    "make_plan",
    "named_statistics",
    "plot_statistics",
    "specs_of",
    "warn",
    "with_doubts",
]
