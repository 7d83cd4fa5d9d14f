"""`weights=`: which leaves the user says are parameters."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from fp8jax._described import described
from fp8jax.transform.call._leaves import Leaf

Weights: TypeAlias = Callable[[str], bool] | int | str | Collection[int | str] | None


def check_weights(weights: Weights) -> None:
    """Raises ValueError, on behalf of `fp8_transform`, for what names no arguments."""
    if weights is None or callable(weights) or isinstance(weights, (int, str)):
        return
    if isinstance(weights, Collection) and all(
        isinstance(w, (int, str)) for w in weights
    ):
        return
    raise ValueError(
        "fp8_transform takes weights=None, a predicate on paths like "
        "'state/params/up/kernel', or the numbers or names of the arguments that are "
        f"parameters, got {described(weights)}."
    )


def weights_after(weights: Weights, count: int) -> Weights:
    """The same weights, after `count` more positional arguments."""
    if isinstance(weights, int):
        return weights + count
    if weights is None or callable(weights) or isinstance(weights, str):
        return weights
    return [w + count if isinstance(w, int) else w for w in weights]


def named_weights(
    weights: Callable[[str], bool] | int | str | Collection[int | str],
    leaves: Sequence[Leaf],
) -> list[bool]:
    """For each leaf whether it is one.

    Raises:
        ValueError: If `weights` names an argument that the call lacks.
    """
    if callable(weights):
        return [bool(weights(leaf.full_path)) for leaf in leaves]
    names = {weights} if isinstance(weights, (int, str)) else set(weights)
    known = {leaf.argument for leaf in leaves} | {leaf.number for leaf in leaves}
    if not names <= known:
        arguments = dict.fromkeys(leaf.argument for leaf in leaves)
        raise ValueError(
            f"fp8_transform was given weights={weights!r}, but this call's arguments "
            f"that hold arrays are {', '.join(arguments)}."
        )
    return [leaf.argument in names or leaf.number in names for leaf in leaves]
