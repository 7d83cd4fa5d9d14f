"""What the first call of each kind warns of."""

import contextlib
import pathlib
import sys
import warnings

import jax

from fp8jax import ops
from fp8jax.transform.plan._plan import Plan
from fp8jax.transform.plan._policy import Policy

# Whose frames stand between a call and a warning: this library's, JAX's, and contexts'.
_LIBRARIES = (
    str(pathlib.Path(__file__).parents[2]),
    str(pathlib.Path(jax.__file__).parent),
    contextlib.__file__,
)


def warn(plan: Plan, policy: Policy, name: str) -> None:
    """Warns of what the plan leaves undone, on behalf of `fp8_transform(name)`."""
    report = plan.report
    for doubt in plan.doubts:
        _warn(f"fp8_transform({name}): {doubt} See .report(*args).")
    for pattern in report.unmatched_rules:
        _warn(
            f"fp8_transform({name}): the rule {pattern!r} matched no layer's weight; "
            "see .report(*args).",
        )
    for pattern in report.unmatched_custom_rules:
        _warn(
            f"fp8_transform({name}): {pattern!r} in custom_rules is the name of no "
            "function with a custom_vjp or custom_jvp; see .report(*args).",
        )
    emulated = [
        f"{row.path} ({row.role})" for row in report.rows if row.kernel == "xla"
    ]
    if emulated and policy.implementation is None and ops.has_gpu_kernels():
        others = f" and {len(emulated) - 3} more" if len(emulated) > 3 else ""
        _warn(
            f"fp8_transform({name}): {', '.join(emulated[:3])}{others} run in XLA's "
            "emulation of FP8, many times slower than the GPU kernels; "
            ".report(*args) says why.",
        )
    if not any(row.status == "fp8" for row in report.rows) and not policy.recipe.is_off:
        _warn(
            f"fp8_transform({name}) found no matrix product to compute in FP8; "
            ".report(*args) says why.",
        )


def _warn(message: str) -> None:
    """Warns of the line that called the function, outside of all libraries between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
