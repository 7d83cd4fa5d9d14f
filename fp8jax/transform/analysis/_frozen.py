"""Parameters that the step does not train: frozen bases, on the way to trained ones.

A cotangent that a leaf is multiplied by, on its way to a parameter before that, crosses
a layer as a trained one does: the base under adapters, a critic that trains a
generator. No cotangent crosses a teacher. What may look so, and is data: what else is
multiplied by parameters themselves, and a matrix that mixes rows, as a graph's.
"""

from collections.abc import Sequence

from fp8jax.transform.analysis._gradients import gradients
from fp8jax.transform.analysis._known_weights import Parameters
from fp8jax.transform.analysis._values import SIDES, Dot, Side, other_side


def frozen_leaves(dots: Sequence[Dot], parameters: Parameters) -> int:
    """`Value.leaves` of weights that gradients of what is trained pass.

    Args:
        dots: of a whole step.
        parameters: that are trained.
    """
    found = 0
    for gradient in gradients(dots):
        dot, side = gradient.forward, gradient.side
        x, weight = dot.operand(side), dot.operand(other_side(side))
        is_trained = parameters.is_pure(x) or parameters.is_derived(x)
        is_activation = x.leaves & parameters.mask and not is_trained
        is_version = weight.versions and not weight.others | weight.cotangent
        with_data = weight.leaves & parameters.data
        if is_activation and is_version and not with_data and is_layer(dot, side):
            found |= weight.versions & ~parameters.mask
    return found


def is_layer(dot: Dot, side: Side) -> bool:
    """Whether this operand is contracted along its last dimension: its features.

    A matrix from the left mixes rows, as a graph's adjacency does: it is data.
    """
    if dot.dimension_numbers is None:
        return False
    contracted = dot.dimension_numbers[0][side == "rhs"]
    return dot.aval(side).ndim - 1 in contracted


def multiplies_features(dot: Dot, leaf: int) -> bool:
    """Whether a leaf is one operand, and the other one's features are contracted."""
    sides: list[Side] = [side for side in SIDES if dot.operand(side).only_leaf == leaf]
    return len(sides) == 1 and is_layer(dot, other_side(sides[0]))
