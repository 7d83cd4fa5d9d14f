"""Which leaves of the arguments are parameters."""

from collections.abc import Sequence

from fp8jax.transform.analysis._roles import (
    differentiated_leaves,
    forward_leaves,
    is_whole_step,
)
from fp8jax.transform.analysis._values import Dot
from fp8jax.transform.call import Leaf, Weights, named_weights


def weight_mask(weights: Weights, leaves: Sequence[Leaf], dots: Sequence[Dot]) -> int:
    """Which leaves are parameters, as `Value.leaves`.

    What `weights` says; else the leaves that the step differentiates and their
    siblings; else, in a forward pass, QTensors, beside which arrays stay as they are;
    else those in `params`, or of type `nnx.Param`; else, if the function is a forward
    pass, those of the first argument, if that is a container.

    Raises:
        ValueError: If `weights` names an argument that the call lacks.
    """
    if weights is not None:
        return _mask(named_weights(weights, leaves))
    if is_whole_step(dots):
        sure, unsure = differentiated_leaves(dots, [leaf.is_float for leaf in leaves])
        found = sure | _of_families(sure, unsure, leaves)
        if found:
            return found | _siblings(found, leaves, forward_leaves(dots))
    stored = [leaf.is_stored for leaf in leaves]
    if any(stored) and not is_whole_step(dots):
        return _mask(stored)
    hinted = [leaf.is_param for leaf in leaves]
    if any(hinted) or is_whole_step(dots):
        return _mask(hinted)
    return _mask([leaf.number == 0 and bool(leaf.keys) for leaf in leaves])


def _of_families(sure: int, unsure: int, leaves: Sequence[Leaf]) -> int:
    """Of leaves whose gradient may be another's, those beside a leaf that is sure.

    A teacher's first layer meets the student's input and has its sizes, and a batch of
    real images meets the weight that generated ones meet. All of them, if none is sure.
    """
    families = {leaf.family for i, leaf in enumerate(leaves) if sure >> i & 1}
    near = [not families or leaf.family in families for leaf in leaves]
    return unsure & _mask(near)


def _siblings(found: int, leaves: Sequence[Leaf], examined: int) -> int:
    """Leaves beside those found, less the ones seen to have no gradient."""
    families = {leaf.family for i, leaf in enumerate(leaves) if found >> i & 1}
    near = [leaf.is_float and leaf.family in families for leaf in leaves]
    return _mask(near) & ~examined


def _mask(chosen: Sequence[bool]) -> int:
    return sum(1 << i for i, is_chosen in enumerate(chosen) if is_chosen)
