"""Default rules about one program's own leaves: by what reads products, by scopes."""

import re
from collections.abc import Iterator, Sequence

from fp8jax.recipes import DEFAULT_SKIPS, Rule, first_match
from fp8jax.transform.analysis import TABLE, Assignment, Readers, skipped_for
from fp8jax.transform.call import Leaf

# Norms hold no products; a layer's scope may be named for one that begins it.
_BY_SCOPE = [rule for rule in DEFAULT_SKIPS if rule.reason != "norm"]


def found_rules(
    readers: Readers, assigned: Sequence[Assignment], leaves: Sequence[Leaf]
) -> tuple[Rule, ...]:
    """Rules that leave routers, heads and embeddings alone whatever their names are.

    Args:
        readers: what reads products' results.
        assigned: the roles.
        leaves: of the arguments.
    """
    reasons: dict[int, str] = {}
    for a in assigned:
        if a.weight is not None and a.role in ("fprop", "recompute"):
            for reason in _reasons(readers, a, a.weight):
                reasons.setdefault(a.weight, reason)
    return tuple(
        Rule(re.escape(leaves[leaf].full_path), None, reason)
        for leaf, reason in reasons.items()
    )


def _reasons(readers: Readers, a: Assignment, weight: int) -> Iterator[str]:
    reason = skipped_for(readers.of.get(a.dot.position, ()))
    if reason:
        yield reason
    if readers.tables >> weight & 1:
        yield TABLE
    scope = scopes(a.dot.scope.stack)
    rule = first_match(_BY_SCOPE, scope, "fprop", 1, 1)
    if rule is not None:
        yield f"{rule.reason}: in the scope {scope}"


def scopes(stack: str) -> str:
    """The names of scopes in a name stack, without those of transformations."""
    names = re.split(r"[/()]+", stack)
    transformations = {"", "jvp", "transpose", "vmap", "jit", "remat", "checkpoint"}
    kept = [name for name in names if name not in transformations]
    return "/".join(kept)
