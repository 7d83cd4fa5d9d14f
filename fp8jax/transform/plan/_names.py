"""The names by which rules and reports know a product's weight."""

import collections
import dataclasses
from collections.abc import Sequence

from fp8jax.transform.analysis import MARKED, Assignment
from fp8jax.transform.call import Leaf
from fp8jax.transform.plan._policy import Names


def names_of(a: Assignment, leaf: Leaf) -> Names:
    """The weight's path, the same with its argument, and for lists of arrays the scope.

    A number, as in Keras's lists, says nothing of a layer: there the scope of the
    product does, if the model gives it one.
    """
    names = (leaf.path, leaf.full_path)
    if all(key.isdecimal() for key in leaf.keys[-1:]):
        scope = "/".join(a.dot.scope.within.scope)
        names = (*names, scope) if scope else names
    return names


def layers_of(a: Assignment) -> tuple[int, ...]:
    """The leaves that a product's weight is made of; none of what is left as it is."""
    if a.weight is None or a.side is None or a.dot.primitive == MARKED:
        return ()
    return a.layers or (a.weight,)


def told_apart(
    leaves: Sequence[Leaf], assignments: Sequence[Assignment]
) -> Sequence[Leaf]:
    """Leaves by paths that are no other weight's: with the argument's name, if need be.

    A generator's and a critic's weights may have the same one, a policy's and a value
    net's.
    """
    weights = {layer for a in assignments for layer in layers_of(a)}
    owners: dict[str, set[str]] = collections.defaultdict(set)
    for i in weights:
        owners[leaves[i].path].add(leaves[i].argument)
    shared = {path for path, arguments in owners.items() if len(arguments) > 1}
    return [
        dataclasses.replace(leaf, shows_argument=i in weights and leaf.path in shared)
        for i, leaf in enumerate(leaves)
    ]
