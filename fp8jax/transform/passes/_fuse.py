"""Computes elementwise chains inside the quantization that alone reads their result.

A norm's last products, an activation, a gated product and its gradient are each
written by one kernel and read by the next, the quantizer. Evaluated on the quantizer's
blocks they are neither: only their inputs are read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence

from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.quant import maps_like_quantize
from fp8jax.transform.analysis import OUTSIDE, Pass, Passes
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Calls,
    aval_of,
    construct_of,
    equations,
    in_order,
    jaxprs_of,
    memoized,
    read,
    reading,
    with_equations,
    written_out,
)
from fp8jax.transform.lower import (
    Chain,
    Graph,
    Program,
    Quantize,
    QuantizeBoth,
    QuantizeMap,
    chain_to,
    may_be_in_chain,
)

_BLOCK = 128


def fuse(program: Program) -> Program:
    """Moves chains to where their codes are made.

    A value that something else reads, too, is left: it exists anyway. So is one that
    a forward pass keeps for a backward pass beside it. The numbers are
    those of the chain's steps, each rounded to its dtype.
    """
    calls, passes = program.calls, Passes()
    takes = functools.cache(maps_like_quantize)  # It traces a kernel each time.

    def visit(jaxpr: AnyJaxpr, outer: Pass) -> AnyJaxpr:
        def in_backward(eqn: JaxprEqn) -> bool:
            return passes.at(outer, eqn).phase in ("recompute", "backward")

        eqns = []
        for eqn in equations(jaxpr):
            here = passes.at(outer, eqn)
            construct = construct_of(eqn)
            if construct is not None:
                contexts = [here] * len(construct.bodies)
                eqn = construct.visited(visited, contexts).equation()
            eqns.append(eqn)
        outvars = _compat.open_jaxpr(jaxpr).outvars
        # Only where chains are found are calls written out: elsewhere they stay shared.
        if any(_ways(eqn, calls) for eqn in eqns):
            fused = _fused(eqns, outvars, calls, in_backward, takes)
            if fused is not None:
                return with_equations(jaxpr, *fused)
        return with_equations(jaxpr, eqns)

    visited = memoized(visit, key=lambda outer: outer.phase)
    return program.of(visited(program.jaxpr, OUTSIDE))


@dataclasses.dataclass(frozen=True, eq=False)
class _Root:
    """A value that only quantizations read.

    Attributes:
        value: its variable.
        eqns: the quantizations.
        ways: of each of them, one or two.
    """

    value: Var
    eqns: tuple[JaxprEqn, ...]
    ways: tuple[Quantize, ...]

    @property
    def kind(self) -> Hashable:
        """A key that roots share whose codes one call can make."""
        way, eqn = self.ways[0], self.eqns[0]
        return aval_of(self.value).shape, way.other_tiles, way.implementation, eqn.ctx

    @property
    def codes(self) -> list[Var]:
        return [v for eqn in self.eqns for v in eqn.outvars]


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Roots whose codes one call makes, and the chain to them."""

    roots: tuple[_Root, ...]
    chain: Chain

    @property
    def call(self) -> QuantizeMap:
        shape = self.roots[0].ways[0].operand.shape
        ways = tuple(root.ways for root in self.roots)
        return QuantizeMap(self.chain.function, shape, ways)


def _fused(
    old: Sequence[JaxprEqn],
    outvars: Sequence[Atom],
    calls: Calls,
    in_backward: Callable[[JaxprEqn], bool],
    takes: Callable[..., bool],
) -> tuple[list[JaxprEqn], list[Atom]] | None:
    """Equations and results with chains in calls; None if there are none."""
    eqns, env = _with_calls_written_out(old)
    outvars = [read(x, env) for x in outvars]
    graph = Graph(eqns, outvars, in_backward)
    groups = _groups(_roots(eqns, graph, calls), graph, takes)
    if not groups:
        return None
    gone: set[int] = set()
    made: list[JaxprEqn] = []
    for group in groups:
        place = group.roots[-1].eqns[-1]
        new, _ = calls(group.call, place, *group.chain.inputs)
        codes = [v for root in group.roots for v in root.codes]
        made += [*new[:-1], new[-1].replace(outvars=codes)]
        gone |= {id(eqn) for root in group.roots for eqn in root.eqns}
    left = [eqn for eqn in eqns if id(eqn) not in gone]
    return in_order([*left, *made]), outvars


def _with_calls_written_out(
    old: Sequence[JaxprEqn],
) -> tuple[list[JaxprEqn], dict[Var, Atom]]:
    """Writes out calls of functions that chains may pass through.

    Returns:
        The equations, and what stands for the results of those calls.
    """
    eqns: list[JaxprEqn] = []
    env: dict[Var, Atom] = {}
    for eqn in old:
        eqn = reading(eqn, env)
        call = construct_of(eqn)
        if call is None or not call.is_plain or not _may_be_in_chain(eqn):
            eqns.append(eqn)
            continue
        body, results = written_out(call)
        made, within = _with_calls_written_out(body)
        eqns += made
        results = (read(x, within) for x in results)
        env.update(zip(eqn.outvars, results, strict=True))
    return eqns, env


def _may_be_in_chain(call: JaxprEqn) -> bool:
    return all(map(may_be_in_chain, _inner(call)))


def _inner(eqn: JaxprEqn) -> list[JaxprEqn]:
    """The equations that one runs, in calls within it, too."""
    found = []
    for inner in (x for body in jaxprs_of(eqn) for x in equations(body)):
        found += _inner(inner) or [inner]
    return found


def _ways(eqn: JaxprEqn, calls: Calls) -> tuple[Quantize, ...]:
    """How an equation quantizes its operand; () if it does not."""
    way = calls.of(eqn)
    if isinstance(way, QuantizeBoth):
        return way.one, way.other
    return (way,) if isinstance(way, Quantize) else ()


def _roots(eqns: Sequence[JaxprEqn], graph: Graph, calls: Calls) -> list[_Root]:
    """Values that only quantizations read, and that a kernel could compute."""
    by_value: dict[Var, list[JaxprEqn]] = {}
    for eqn in eqns:
        if _ways(eqn, calls) and isinstance(eqn.invars[0], Var):
            by_value.setdefault(eqn.invars[0], []).append(eqn)
    found = []
    for value, several in by_value.items():
        ways = tuple(way for eqn in several for way in _ways(eqn, calls))
        root = _Root(value, tuple(several), ways)
        alone = not graph.is_read_beside(value, {id(eqn) for eqn in several})
        made_here = value in graph.maker and value not in graph.kept
        if alone and made_here and _fits(root):
            found.append(root)
    return found


def _fits(root: _Root) -> bool:
    """Whether its quantizations are of whole blocks, each side once.

    Of those of one matrix or, in a batch, of each.
    """
    shape, first = aval_of(root.value).shape, root.ways[0]
    sides = [way.operand.contraction for way in root.ways]
    batch, _, _ = first.operand.ranks
    matrix = (*shape[:batch], math.prod(shape[batch:-1]), shape[-1])
    return (
        len(set(sides)) == len(sides)
        and {(way.matrix, way.other_tiles) for way in root.ways}
        == {(first.matrix, first.other_tiles)}
        # The kernel reads the matrix as it lies: nothing may be moved before.
        and first.operand.permutation == tuple(range(len(shape)))
        and first.operand.shape == matrix
        and all(side and side % _BLOCK == 0 for side in matrix[batch:])
        and not _compat.is_explicit(root.value.aval)
    )


def _groups(
    roots: Sequence[_Root], graph: Graph, takes: Callable[..., bool]
) -> list[_Group]:
    """The roots that are fused, those that read the same matrices together."""
    groups = []
    for together in _related(roots, graph):
        group = _group(together, graph, takes)
        if group is not None:
            groups.append(group)
        elif len(together) > 1:
            groups += _greedy(together, graph, takes)
    return groups


def _related(roots: Sequence[_Root], graph: Graph) -> list[list[_Root]]:
    """Roots of one kind that are connected by matrices that their chains read.

    Without a matrix in common one call would read no less than two do.
    """
    related: list[tuple[list[_Root], set[Var]]] = []
    for root in roots:
        chain = chain_to([root.value], graph, {id(eqn) for eqn in root.eqns})
        if chain is None:
            continue
        members, matrices = [root], set(chain.matrices)
        apart = []
        for others, theirs in related:
            if others[0].kind == root.kind and not theirs.isdisjoint(matrices):
                members, matrices = others + members, matrices | theirs
            else:
                apart.append((others, theirs))
        related = [*apart, (members, matrices)]
    return [members for members, _ in related]


def _greedy(
    roots: Sequence[_Root], graph: Graph, takes: Callable[..., bool]
) -> list[_Group]:
    """Groups of roots that no single call can make: each joins the first that may."""
    groups: list[_Group] = []
    for root in roots:
        for i, group in enumerate(groups):
            together = _group([*group.roots, root], graph, takes)
            if together is not None:
                groups[i] = together
                break
        else:
            alone = _group([root], graph, takes)
            if alone is not None:
                groups.append(alone)
    return groups


def _group(
    roots: Sequence[_Root], graph: Graph, takes: Callable[..., bool]
) -> _Group | None:
    """A call for these roots; None if no kernel takes the chain, or order forbids."""
    eqns = {id(eqn) for root in roots for eqn in root.eqns}
    chain = chain_to([root.value for root in roots], graph, eqns)
    # What is made of the group's own codes cannot stand before the call as well.
    if chain is None or any(graph.depends(x, eqns) for x in chain.inputs):
        return None
    group = _Group(tuple(roots), chain)
    call = group.call
    how = call.specs, call.implementation
    # Asked now: once the equations are gone, a refusal would have no way back.
    return group if takes(call.function, call.shape, *how) else None
