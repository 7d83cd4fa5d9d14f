"""The names by which a rule knows a product's weight."""

from fp8jax.transform._leaves import Leaf
from fp8jax.transform._policy import Names
from fp8jax.transform._roles import Assignment


def names_of(a: Assignment, leaf: Leaf) -> Names:
    """The weight's path, the same with its argument, and for lists of arrays the scope.

    Paths of numbers alone, as of Keras's lists, say nothing of a layer: there the scope
    of the product does, if the model gives it one.
    """
    names = (leaf.path, leaf.full_path)
    if all(key.isdecimal() for key in leaf.keys):
        scope = "/".join(a.dot.scope.within.scope)
        names = (*names, scope) if scope else names
    return names
