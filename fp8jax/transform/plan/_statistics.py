"""Quantization errors of a step's products, by path and role; and a plot of them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from fp8jax._extras import needed_by
from fp8jax.quant import statistics, sum_moments

Statistics: TypeAlias = dict[str, dict[str, dict[str, jax.Array]]]


def named_statistics(
    names: Sequence[tuple[str, str]],
    where: Sequence[int | None],
    moments: Sequence[jax.Array],
) -> Statistics:
    """`{path: {role: {name: array}}}` of the products of one program.

    Args:
        names: path and role of each product, in program order.
        where: which of `moments` is each one's; None for a product not measured.
        moments: `[*iterations, 2, 6]`.
    """
    found: dict[tuple[str, str], list[jax.Array]] = {}
    for name, index in zip(names, where, strict=True):
        if index is not None:
            found.setdefault(name, []).append(moments[index])
    named: Statistics = {}
    for (path, role), several in found.items():
        named.setdefault(path, {})[role] = statistics(_together(several))
    return named


def _together(several: Sequence[jax.Array]) -> jax.Array:
    """Of a weight that is used several times; iterations stay if all have the same."""
    if len({x.shape for x in several}) > 1:
        several = [over_iterations(x) for x in several]
    return sum_moments(several)


def over_iterations(x: jax.Array) -> jax.Array:
    """`[2, 6]` moments of all iterations together."""
    return sum_moments(list(x.reshape(-1, *x.shape[-2:])))


def plot_statistics(
    stats: Mapping[str, Mapping[str, Mapping[str, Any]]],
    name: str = "sqnr_db",
    ax: Any = None,
) -> Any:
    """Draws one statistic of every product, one marker for an operand and iteration.

    Args:
        stats: what a function made by `fp8_transform(..., stats=True)` returns second.
        name: `"sqnr_db"`, `"underflow"`, `"saturated"` or `"amax"`.
        ax: matplotlib axes; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: If `name` is none of these.
        ModuleNotFoundError: If matplotlib is not installed; it names the extra.
    """
    rows = [
        (path, role, values) for path in stats for role, values in stats[path].items()
    ]
    known = sorted({key for _, _, values in rows for key in values})
    if rows and name not in known:
        raise ValueError(f"plot_statistics takes name in {known}, got {name!r}.")
    with needed_by("plot_statistics", "cli"):
        import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(8, 1 + 0.25 * len(rows)), layout="constrained")
    for side, marker in enumerate("o^"):
        label = ("first operand", "second operand")[side]
        for i, (_, _, values) in enumerate(rows):
            points = np.ravel(np.asarray(values[name])[..., side])
            at = np.full(len(points), i)
            ax.plot(points, at, marker, color=f"C{side}", label=label, alpha=0.6)
            label = None
    ax.set_yticks(range(len(rows)), [f"{path} {role}" for path, role, _ in rows])
    ax.invert_yaxis()
    ax.set_xlabel(name)
    ax.legend()
    return ax
