"""What the first call of each kind warns of."""

import warnings

from fp8jax import ops
from fp8jax.transform._plan import Plan
from fp8jax.transform._policy import Policy


def warn(plan: Plan, policy: Policy, name: str) -> None:
    """Warns of what the plan leaves undone, on behalf of `fp8_transform(name)`."""
    report = plan.report
    for doubt in plan.doubts:
        warnings.warn(
            f"fp8_transform({name}): {doubt} See .report(*args).", stacklevel=2
        )
    for pattern in report.unmatched_rules:
        warnings.warn(
            f"fp8_transform({name}): the rule {pattern!r} matched no layer's weight; "
            "see .report(*args).",
            stacklevel=2,
        )
    for pattern in report.unmatched_custom_rules:
        warnings.warn(
            f"fp8_transform({name}): {pattern!r} in custom_rules is the name of no "
            "function with a custom_vjp or custom_jvp; see .report(*args).",
            stacklevel=2,
        )
    emulated = [
        f"{row.path} ({row.role})" for row in report.rows if row.kernel == "xla"
    ]
    if emulated and policy.implementation is None and ops.has_gpu_kernels():
        others = f" and {len(emulated) - 3} more" if len(emulated) > 3 else ""
        warnings.warn(
            f"fp8_transform({name}): {', '.join(emulated[:3])}{others} run in XLA's "
            "emulation of FP8, many times slower than the GPU kernels; "
            ".report(*args) says why.",
            stacklevel=2,
        )
    if not any(row.status == "fp8" for row in report.rows) and not policy.recipe.is_off:
        warnings.warn(
            f"fp8_transform({name}) found no matrix product to compute in FP8; "
            ".report(*args) says why.",
            stacklevel=2,
        )
