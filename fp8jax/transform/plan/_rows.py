"""A product's row in the report."""

from collections.abc import Callable, Sequence

from fp8jax.transform.analysis import MARKED, Assignment, Side, other_side
from fp8jax.transform.call import Leaf
from fp8jax.transform.plan._decisions import specs_of
from fp8jax.transform.plan._kernels import Verdict, kernel
from fp8jax.transform.plan._report import Row, describe_tiles


def row_of(
    a: Assignment,
    leaves: Sequence[Leaf],
    verdict: Verdict,
    kernel_of: Callable[..., str],
) -> Row:
    dot = a.dot
    first = first_side(a)
    specs = specs_of(verdict.replacement)
    known = dot.flops is None
    return Row(
        path=_path(a, leaves),
        role=a.role,
        m=dot.free(first) if known else 0,
        n=dot.free(other_side(first)) if known else 0,
        k=dot.contraction if known else 0,
        status="skipped" if not specs and dot.primitive != MARKED else "fp8",
        reason=verdict.reason,
        tiles=describe_tiles(*(spec.tile for spec in specs)),
        kernel=kernel(verdict.replacement, dot, kernel_of),
        count=dot.scope.times * dot.batch,
        flops=dot.total_flops,
    )


def first_side(a: Assignment) -> Side:
    """The first operand as recipes count it: activation, or output gradient."""
    if a.side is None:
        return "lhs"
    return a.side if a.role == "wgrad" else other_side(a.side)


def _path(a: Assignment, leaves: Sequence[Leaf]) -> str:
    if a.weight is None:
        return a.dot.scope.stack
    layers = a.layers or (a.weight,)
    return " | ".join(dict.fromkeys(leaves[layer].shown for layer in layers))
