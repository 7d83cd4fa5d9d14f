"""Which leaves of the arguments are parameters."""

from collections.abc import Sequence

from fp8jax.transform.analysis._frozen import frozen_leaves
from fp8jax.transform.analysis._gradients import operands_of
from fp8jax.transform.analysis._known_weights import Parameters
from fp8jax.transform.analysis._roles import differentiated_leaves, is_whole_step
from fp8jax.transform.analysis._values import Dot, other_side
from fp8jax.transform.call import Leaf, Weights, named_weights


def weight_mask(
    weights: Weights,
    leaves: Sequence[Leaf],
    dots: Sequence[Dot],
    updated: int,
    returned: int,
) -> int:
    """Which leaves are parameters, as `Value.leaves`.

    What `weights` says; else the leaves that the step differentiates, frozen ones
    that gradients pass on the way, and the siblings of both; else, in a forward pass,
    QTensors, beside which arrays stay as they are; else those in `params`, or of type
    `nnx.Param`; else, if the function is a forward pass, those of the first argument
    that is neither static, a number nor a random key, if that is a container.

    Args:
        weights: what the user said.
        leaves: of the arguments.
        dots: of the function.
        updated: `Value.leaves` of what gradients go into.
        returned: `Value.leaves` of those of which a result may be the gradient.

    Raises:
        ValueError: If `weights` names an argument that the call lacks.
    """
    if weights is not None:
        return _mask(named_weights(weights, leaves))
    if is_whole_step(dots):
        is_float = [leaf.is_float for leaf in leaves]
        sure, unsure = differentiated_leaves(dots, is_float, updated)
        unsure = unsure & returned or unsure
        found = sure | _of_families(sure, unsure, leaves)
        found &= ~_inputs(found, leaves, dots)
        if found:
            return found | _siblings(found, leaves, dots)
    stored = [leaf.is_stored for leaf in leaves]
    if any(stored) and not is_whole_step(dots):
        return _mask(stored)
    hinted = [leaf.is_param for leaf in leaves]
    if any(hinted) or is_whole_step(dots):
        return _mask(hinted)
    first = _first_argument(leaves)
    return _mask([leaf.number == first and bool(leaf.keys) for leaf in leaves])


def _first_argument(leaves: Sequence[Leaf]) -> int:
    """Of the positional arguments that may be parameters, the first one's number."""
    numbers = [
        leaf.number
        for leaf in leaves
        if leaf.number is not None
        and (leaf.keys or not (leaf.is_key or leaf.size == 1))
    ]
    return min(numbers, default=-1)


def _of_families(sure: int, unsure: int, leaves: Sequence[Leaf]) -> int:
    """Of leaves whose gradient may be another's, those beside a leaf that is sure.

    A teacher's first layer meets the student's input and has its sizes, and a batch of
    real images meets the weight that generated ones meet. If none is sure, those in
    containers, or else all of them.
    """
    families = _families(sure, leaves)
    if families:
        return unsure & _mask([leaf.family in families for leaf in leaves])
    return unsure & _mask([bool(leaf.keys) for leaf in leaves]) or unsure


def _inputs(found: int, leaves: Sequence[Leaf], dots: Sequence[Dot]) -> int:
    """Of leaves with a gradient, arrays that meet one in a container: data, then."""
    bare = _mask([not leaf.keys for leaf in leaves]) & found
    inputs = 0
    both = (*operands_of(dots), *operands_of(dots, batched=True))
    for dot, side in both if bare else ():
        x, weight = dot.operand(side), dot.operand(other_side(side))
        if dot.scope.phase == "forward" and weight.versions & found & ~bare:
            inputs |= 0 if x.others else x.versions & bare
    return inputs


def _siblings(found: int, leaves: Sequence[Leaf], dots: Sequence[Dot]) -> int:
    """Leaves beside trained parameters, and frozen ones with those beside them."""
    parameters = parameters_of(found, dots, leaves)
    frozen = frozen_leaves(dots, parameters) & ((1 << len(leaves)) - 1)
    frozen |= _mask([leaf.is_stored for leaf in leaves])
    near = _families(found, leaves)
    near |= _families(frozen, leaves) - _families(parameters.data, leaves)
    # Codes of a base may be integers, as those of its other layers are.
    stored = {(leaf.family, leaf.is_float) for leaf in _chosen(frozen, leaves)}
    beside = [
        leaf.family in near
        and (leaf.is_float or (leaf.family, leaf.is_float) in stored)
        for leaf in leaves
    ]
    return _mask(beside) & ~parameters.data


def parameters_of(mask: int, dots: Sequence[Dot], leaves: Sequence[Leaf]) -> Parameters:
    """The parameters among leaves, with what is data beside them."""
    keys = _mask([leaf.is_key for leaf in leaves])
    return Parameters.of(mask, dots, [leaf.size for leaf in leaves], keys)


def _families(chosen: int, leaves: Sequence[Leaf]) -> set[tuple[str, ...]]:
    return {leaf.family for leaf in _chosen(chosen, leaves)}


def _chosen(chosen: int, leaves: Sequence[Leaf]) -> list[Leaf]:
    return [leaf for i, leaf in enumerate(leaves) if chosen >> i & 1]


def _mask(chosen: Sequence[bool]) -> int:
    return sum(1 << i for i, is_chosen in enumerate(chosen) if is_chosen)
