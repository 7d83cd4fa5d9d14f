"""What becomes of the products of weights that came as QTensors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from fp8jax import _compat
from fp8jax.recipes import GemmName
from fp8jax.transform.analysis import (
    SIDES,
    Assignment,
    Dot,
    Side,
    Stored,
    StoredOperands,
)
from fp8jax.transform.call import Leaf
from fp8jax.transform.plan._decisions import StoredDot
from fp8jax.transform.plan._names import names_of
from fp8jax.transform.plan._policy import Policy

_STORED = "stored in FP8"
CONTRACTION_TILE = 128  # Of the products of codes.


def stored_dot(
    a: Assignment,
    stored: Mapping[Side, Stored],
    leaves: Sequence[Leaf],
    policy: Policy,
    obstacle: Callable[[Dot], str],
) -> tuple[StoredDot | None, str]:
    """The product of codes that stands in for one of arrays, or None, and the reason.

    Args:
        a: the product's role.
        stored: its operands that came as QTensors.
        leaves: of the arguments, for their paths.
        policy: what the user asked for. Default rules are about what to quantize,
            which is settled here: only the user's count.
        obstacle: tells why no product in FP8 can stand in for one, or `""`.
    """

    def left(reason: str) -> tuple[None, str]:
        return None, f"{reason}: its QTensor is dequantized"

    dot, is_dgrad = a.dot, a.role == "dgrad"
    if reason := obstacle(dot) or ("batch dimensions" if dot.has_batch else ""):
        return left(reason)
    if len(stored) > 1 or a.side is None or a.weight is None or a.side not in stored:
        return left("none of its operands is known to be an activation")
    if _compat.is_explicit(dot.out_aval):
        return left("explicit sharding")
    weight = stored[a.side]
    contracted = dot.dimension_numbers[0][SIDES.index(a.side)]
    if len(contracted) != 1 or dot.aval(a.side).ndim != 2:
        return left("no product of two matrices")
    names, free = names_of(a, leaves[a.weight]), dot.free(a.side)
    gemm: GemmName = "dgrad" if is_dgrad else "fprop"
    features = (free, dot.contraction) if is_dgrad else (dot.contraction, free)
    rule = policy.users_rule_for(names, gemm, *features)
    recipe = policy.recipe if rule is None else rule.gives
    spec = getattr(recipe, gemm)
    if spec is None:
        said = f"rule: {rule.reason or rule.pattern}" if rule else "the recipe"
        return left(f"no {gemm} in FP8, by {said}")
    # A gradient by codes is a product by their transpose, of cotangents.
    recipe = dataclasses.replace(recipe, fprop=spec, residual="bf16")
    tile = weight.operand_tile[contracted[0]]
    if tile != CONTRACTION_TILE:
        return left(f"tiles of {tile} along the contraction, not {CONTRACTION_TILE}")
    implementation = policy.implementation
    return StoredDot(a.side, weight, recipe, contracted[0], implementation), _STORED


def notes_on(stored: StoredOperands, leaves: Sequence[Leaf]) -> list[str]:
    """For the report: QTensors that something else than a product reads."""
    paths = [leaves[i].path for i in sorted(stored.inflated)]
    found = ", ".join(dict.fromkeys(paths))
    return (
        [f"Dequantized, for what is no product of two matrices: {found}."]
        if found
        else []
    )
