"""What a kernel is for, by its name and the operation that launched it."""

import re

from fp8jax.transform.profile._events import Event
from fp8jax.transform.profile._origins import Origins

# What kernels are for that are no row's product, in the order of the table.
OTHERS = (
    "quantization",
    "attention",
    "other GEMMs",
    "copies",
    "collectives",
    "XLA's fusions",
)
# By the first that a kernel's name holds.
_BY_NAME = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"^mem(cpy|set)", "copies"),
        (r"nccl", "collectives"),
        (r"^fp8jax_\w*gemm", "product"),
        (r"^fp8jax_", "quantization"),
        (r"flash|fmha|sdpa|attention|cudnn::fusion", "attention"),
        (r"nvjet|cublas|cutlass|xmma|gemm", "product"),
    )
)


def kind_of(event: Event, origins: Origins) -> tuple[str, tuple[int, ...]]:
    """What the kernel is for, and the report's rows if it is a product's.

    Several rows are those of products of one size, of which XLA does not say which one
    launched it.

    Args:
        event: the kernel.
        origins: of the program's operations.
    """
    named = next((kind for p, kind in _BY_NAME if p.search(event.name)), None)
    if named is not None and named != "product":
        return named, ()
    origin = origins.of(event.op)
    if named is None and origin.quantizes:
        return "quantization", ()
    # XLA's own fusions of a product: it may be one, or a sum of its parts.
    if origin.row is not None:
        return "product", (origin.row,)
    if rows := origins.rows_of_kernel(event.name):
        return "product", rows
    if named == "product" or origin.multiplies:
        return "other GEMMs", ()
    return "XLA's fusions", ()
