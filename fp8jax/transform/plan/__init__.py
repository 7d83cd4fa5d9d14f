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
from fp8jax.transform.plan._report import Report, Row, how
from fp8jax.transform.plan._rule_call import RuleCall
from fp8jax.transform.plan._splits import Splits
from fp8jax.transform.plan._statistics import named_statistics, plot_statistics
from fp8jax.transform.plan._table import (
    html_table,
    markdown_table,
    readable,
    text_table,
)
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
    "how",
    "html_table",
    "make_plan",
    "markdown_table",
    "named_statistics",
    "plot_statistics",
    "readable",
    "specs_of",
    "text_table",
    "warn",
    "with_doubts",
]
