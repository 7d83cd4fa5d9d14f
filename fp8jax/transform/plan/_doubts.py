"""What a whole step's plan should make one doubt: products that seem to be missing.

A plan is suspicious where a layer's forward product is in FP8 and a product that looks
like one of its gradients is not known as that, or where a leaf that is multiplied like
a parameter has no gradient here. Layers that are frozen, and first layers, whose input
needs no gradient, have no such products: they are no cause for doubt.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

from fp8jax.transform.analysis import (
    Assignment,
    Dot,
    Role,
    Side,
    gradient_sizes,
    multiplies_features,
    operands_of,
    other_side,
    sizes_of,
)
from fp8jax.transform.call import Leaf
from fp8jax.transform.ir import Position
from fp8jax.transform.plan._names import names_of
from fp8jax.transform.plan._policy import Policy

_SHOWN = 3  # Paths in one message.


@dataclasses.dataclass(frozen=True)
class Overlooked:
    """Products that would be in FP8 if a leaf counted as a parameter."""

    leaf: int
    count: int
    flops: int


def lost_gradients(
    assigned: Sequence[Assignment], in_fp8: Collection[Position]
) -> dict[Role, list[int]]:
    """Leaves whose fprop is in FP8 beside a product that looks like a gradient of it.

    Args:
        assigned: the roles.
        in_fp8: positions of the products in FP8.
    """
    known: dict[Role, set[int]] = collections.defaultdict(set)
    for a in assigned:
        if a.weight is not None:
            known[a.role].update(a.layers or (a.weight,))
    unknown = [a.dot for a in assigned if a.role in ("other", "recompute")]
    by_root: dict[int, list[tuple[Dot, Side]]] = collections.defaultdict(list)
    for dot, side in operands_of(unknown):
        if dot.operand(other_side(side)).cotangent:
            by_root[dot.operand(side).root].append((dot, side))
    found: dict[Role, list[int]] = {"wgrad": [], "dgrad": []}
    for a in assigned:
        if a.role != "fprop" or a.weight is None or a.dot.position not in in_fp8:
            continue
        assert a.side is not None, "layers have a side"
        shared: dict[Role, Side] = {"wgrad": other_side(a.side), "dgrad": a.side}
        for role, side in shared.items():
            sizes = sizes_of(a.dot, side)
            similar = by_root[a.dot.operand(side).root]
            if a.weight not in known[role] and any(
                gradient_sizes(*one) == sizes for one in similar
            ):
                found[role].append(a.weight)
    return {role: list(dict.fromkeys(found[role])) for role in found}


def inputs(assigned: Sequence[Assignment], leaves: Sequence[Leaf]) -> set[int]:
    """Leaves that some layer takes as its input, and those beside them."""
    families = set()
    for a in assigned:
        if a.role in ("fprop", "recompute") and a.side is not None:
            leaf = a.dot.operand(other_side(a.side)).only_leaf
            if leaf is not None and leaf < len(leaves):
                families.add(leaves[leaf].family)
    return {i for i, leaf in enumerate(leaves) if leaf.family in families}


def overlooked(
    assigned: Sequence[Assignment],
    leaves: Sequence[Leaf],
    policy: Policy,
    unsupported: Callable[[Dot], str],
) -> Iterator[Overlooked]:
    """Leaves that are multiplied like parameters, and are none here.

    Args:
        assigned: the roles.
        leaves: of the arguments.
        policy: what the user asked for.
        unsupported: why a product cannot be in FP8, if so.
    """
    data = inputs(assigned, leaves)
    found: dict[int, list[Dot]] = collections.defaultdict(list)
    for a in assigned:
        for leaf in set(a.suspects) - data:
            is_layer = leaves[leaf].is_float and would_be_layer(a, leaf, leaves, policy)
            if is_layer and not (unsupported(a.dot) or a.dot.has_batch):
                found[leaf].append(a.dot)
    for leaf, dots in found.items():
        yield Overlooked(leaf, len(dots), sum(dot.total_flops for dot in dots))


def would_be_layer(
    a: Assignment, leaf: int, leaves: Sequence[Leaf], policy: Policy
) -> bool:
    """Whether a product would be a layer in FP8, were the leaf its weight."""
    dot = a.dot
    if not multiplies_features(dot, leaf):
        return False
    side: Side = "lhs" if dot.lhs.only_leaf == leaf else "rhs"
    k, n = dot.contraction, dot.free(side)
    return policy.gemm(names_of(a, leaves[leaf]), "fprop", k, n)[0] is not None


def doubts(
    assigned: Sequence[Assignment],
    in_fp8: Collection[Position],
    leaves: Sequence[Leaf],
    policy: Policy,
    unsupported: Callable[[Dot], str],
    told: bool,
) -> tuple[str, ...]:
    """One sentence for each doubt about a whole step.

    Args:
        assigned: the roles.
        in_fp8: positions of the products in FP8.
        leaves: of the arguments.
        policy: what the user asked for.
        unsupported: why a product cannot be in FP8, if so.
        told: whether the user said which leaves are parameters.
    """
    said = []
    for role, weights in lost_gradients(assigned, in_fp8).items():
        if weights:
            paths = _listed([leaves[i].path for i in weights])
            said.append(
                f"fprop of {paths} is in FP8, but {role} was not recognized: a product "
                "that looks like it stays as it is."
            )
    several = [] if told else list(overlooked(assigned, leaves, policy, unsupported))
    if several:
        paths = _listed([leaves[one.leaf].full_path for one in several])
        total = sum(a.dot.total_flops for a in assigned)
        share = sum(one.flops for one in several) / max(total, 1)
        said.append(
            f"{sum(one.count for one in several)} products ({share:.1%} of FLOPs) by "
            f"{paths} stay as they are, because the step takes no gradient of that: if "
            "it holds parameters, say so with weights=."
        )
    return tuple(said)


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:_SHOWN])
    more = len(paths) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
