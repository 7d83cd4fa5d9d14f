"""A product's row in the report."""

from collections.abc import Callable, Sequence

from fp8jax.transform.analysis import MARKED, Assignment, Dot, Side, other_side
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
    m, n, k = _sizes(dot, first)
    return Row(
        path=_path(a, leaves),
        role=a.role,
        m=m,
        n=n,
        k=k,
        status="skipped" if not specs and dot.primitive != MARKED else "fp8",
        reason=verdict.reason,
        tiles=describe_tiles(*(spec.tile for spec in specs)),
        kernel=kernel(verdict.replacement, dot, kernel_of),
        count=dot.scope.times * dot.batch,
        flops=dot.total_flops,
    )


def _sizes(dot: Dot, first: Side) -> tuple[int, int, int]:
    """Rows, columns and contraction; zeros if they are not known."""
    if dot.sizes is not None:
        return dot.sizes
    if dot.flops is not None:
        return 0, 0, 0
    return dot.free(first), dot.free(other_side(first)), dot.contraction


def first_side(a: Assignment) -> Side:
    """The first operand as recipes count it: activation, or output gradient."""
    if a.side is None:
        return "lhs"
    return a.side if a.role == "wgrad" else other_side(a.side)


def _path(a: Assignment, leaves: Sequence[Leaf]) -> str:
    if a.weight is None:
        return a.dot.scope.stack
    layers = a.layers or (a.weight,)
    return _together([*dict.fromkeys(leaves[layer].shown for layer in layers)])


def _together(paths: Sequence[str]) -> str:
    """One name for weights that lie side by side: `layers/0..31/up` for a stack."""
    columns = [[*dict.fromkeys(column)] for column in _columns(paths)]
    several = [column for column in columns if len(column) > 1]
    if len(paths) > 2 and len(several) == 1 and all(map(str.isdecimal, several[0])):
        numbers = [int(part) for part in several[0]]
        if numbers == [*range(numbers[0], numbers[0] + len(paths))]:
            run = f"{numbers[0]}..{numbers[-1]}"
            return "/".join(run if len(c) > 1 else c[0] for c in columns)
    return " | ".join(paths)


def _columns(paths: Sequence[str]) -> list[tuple[str, ...]]:
    parts = [path.split("/") for path in paths]
    same = len({len(one) for one in parts}) == 1
    return [*zip(*parts, strict=True)] if same else []
