"""Which kernel multiplies, and what the devices that arrays are spread over allow."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fp8jax import _compat, ops
from fp8jax.transform.analysis import Dot
from fp8jax.transform.plan._decisions import Decision, QuantizedDot, specs_of
from fp8jax.transform.plan._splits import Splits, shares_codes

SPLIT = "sharded over devices, and XLA has no rule to split its GPU kernel by"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a product becomes, None for one that stays as it is; and why."""

    replacement: Decision | None
    reason: str = ""


def on_devices(
    verdict: Verdict,
    dot: Dot,
    spread: ops.Spread,
    splits: Splits,
    kernel_of: Callable[..., str],
) -> Verdict:
    """Adapts a verdict to arrays spread over devices, which XLA splits by rules.

    Rows in groups have no such rule: XLA's own kernels run there.
    """
    what, reason = verdict.replacement, verdict.reason
    if what is None:
        return verdict
    if dot.scope.in_shard_map:
        return verdict
    if dot.ragged is None:
        if spread or _compat.is_explicit(dot.out_aval):
            what = dataclasses.replace(what, split=True)
            if isinstance(what, QuantizedDot) and not shares_codes(what, dot, splits):
                what = dataclasses.replace(what, alone=True)
    elif spread and what.implementation is None:
        if kernel(what, dot, kernel_of) not in ("", "xla"):
            reason = "; ".join(filter(None, (reason, SPLIT)))
        what = dataclasses.replace(what, implementation="xla")
    return Verdict(what, reason)


def kernel(
    replacement: Decision | None, dot: Dot, kernel_of: Callable[..., str]
) -> str:
    specs = specs_of(replacement)
    if replacement is None or not specs:
        return ""
    form = None if dot.ragged is None else dot.ragged.form
    return kernel_of(form, *specs, replacement.implementation)


def implementation_of(form: ops.RaggedForm | None, *how: Any) -> str:
    if form is None:
        return ops.gemm_implementation(*how)
    op = "grouped_wgrad" if form == "wgrad" else "grouped_matmul"
    return ops.grouped_implementation(op, *how)
