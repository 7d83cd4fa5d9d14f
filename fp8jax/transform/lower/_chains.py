"""Elementwise chains of a jaxpr, found from their ends upwards."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from fp8jax._elementwise import FUNCTIONS, Elementwise, Kind, Step
from fp8jax.transform.ir import (
    Atom,
    aval_of,
    broadcast_dimensions,
    has_default_accuracy,
    is_cast,
    is_placement,
    keeps_all_bits,
    power_of,
    primitive_of,
)

_FLOATS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))
# Of a chain: a variable, or a number that it is.
_Value: TypeAlias = Var | np.generic
_MOST_STEPS = 48  # Of a chain: what a block's registers and the compiler bear.


class Graph:
    """Which equation of a jaxpr makes each variable, and which ones read it.

    Attributes:
        maker: of each variable that an equation makes.
        kept: those that a forward pass makes and a backward pass in the jaxpr reads.
    """

    def __init__(
        self,
        eqns: Sequence[JaxprEqn],
        results: Iterable[Atom],
        in_backward: Callable[[JaxprEqn], bool],
    ):
        self.maker = {v: eqn for eqn in eqns for v in eqn.outvars}
        self._readers: dict[Var, list[JaxprEqn]] = {}
        for eqn in eqns:
            for x in eqn.invars:
                if isinstance(x, Var):
                    self._readers.setdefault(x, []).append(eqn)
        self._results = {x for x in results if isinstance(x, Var)}
        later = {id(eqn) for eqn in eqns if in_backward(eqn)}
        self.kept = {
            x
            for x, eqn in self.maker.items()
            if id(eqn) not in later
            and any(id(reader) in later for reader in self._readers.get(x, []))
        }

    def is_read_beside(self, x: Var, eqns: Collection[int]) -> bool:
        """Whether others than these equations, by `id`, read a variable."""
        readers = self._readers.get(x, [])
        return x in self._results or any(id(eqn) not in eqns for eqn in readers)

    def depends(self, x: Var, eqns: Collection[int]) -> bool:
        """Whether a variable is computed from what these equations, by `id`, make."""
        stack, seen = [x], set()
        while stack:
            eqn = self.maker.get(stack.pop())
            if eqn is None or id(eqn) in seen:
                continue
            if id(eqn) in eqns:
                return True
            seen.add(id(eqn))
            stack += [v for v in eqn.invars if isinstance(v, Var)]
        return False


@dataclasses.dataclass(frozen=True)
class Chain:
    """Values that are elementwise functions of others.

    Attributes:
        function: what they are, as matrices.
        inputs: the variables that it takes, in order.
    """

    function: Elementwise
    inputs: tuple[Var, ...]

    @property
    def matrices(self) -> list[Var]:
        return list(self.inputs[: self.function.kinds.count("matrix")])


class _NoChainError(Exception):
    """An input that a chain cannot have."""


def chain_to(
    roots: Sequence[Var], graph: Graph, read_by: Collection[int]
) -> Chain | None:
    """The chain that computes some variables; None if there is none.

    It begins where other equations are no longer elementwise, and already at a value
    that exists anyway, because something else reads it too, if it would take two
    matrices to compute that one. It does not reach from a backward pass into a forward
    pass: what is kept between the two stays what it is.

    Args:
        roots: of one shape.
        graph: of the jaxpr.
        read_by: `id`s of the equations that the chain's values are for.
    """
    walk = _Walk(graph, aval_of(roots[0]).shape)
    try:
        for root in roots:
            walk.visit(root)
        stops = _stops(walk, roots, read_by)
        if stops:
            walk = _Walk(graph, aval_of(roots[0]).shape, stops)
            for root in roots:
                walk.visit(root)
        return walk.chain(roots)
    except _NoChainError:
        return None


def _stops(walk: "_Walk", roots: Sequence[Var], read_by: Collection[int]) -> set[Var]:
    """Values at which a chain should begin, as `chain_to` says."""
    graph = walk.graph
    inside = {id(graph.maker[x]) for x in walk.order} | set(read_by)
    stops: set[Var] = set()
    matrices: dict[_Value, set[Var]] = {}
    for x in walk.order:  # From above: one that stops is one matrix to those below.
        operands = map(walk.visit, graph.maker[x].invars)
        above = [matrices.get(v, walk.matrices(v)) for v in operands]
        matrices[x] = set().union(*above)
        if len(matrices[x]) > 1 and x not in roots and graph.is_read_beside(x, inside):
            first = _before_widening(x, walk)
            stops.add(first)
            matrices[x] = matrices[first] = {first}
    return stops


def _before_widening(x: Var, walk: "_Walk") -> Var:
    """The value of fewer bytes that `x` is a copy of, or `x`.

    What a kernel reads is written to memory: the sum in bfloat16 rather than the
    float32 that a norm makes of it, which its other readers make of the sum as well.
    """
    eqn = walk.graph.maker[x]
    source = walk.visit(eqn.invars[0]) if is_cast(eqn) else None
    if not isinstance(source, Var) or aval_of(source).dtype not in _FLOATS:
        return x
    is_wider = aval_of(x).dtype.itemsize > aval_of(source).dtype.itemsize
    return source if is_wider else x


class _Walk:
    """From values up to what they are computed from.

    Attributes:
        order: variables that the chain computes, each after its operands.
    """

    def __init__(
        self, graph: Graph, shape: tuple[int, ...], stops: Collection[Var] = ()
    ):
        self.graph, self._shape, self._stops = graph, shape, stops
        self._kinds: dict[Var, Kind] = {}  # Of the chain's inputs.
        self._same: dict[Var, _Value] = {}
        self._computed: set[Var] = set()
        self.order: list[Var] = []

    def visit(self, x: Atom) -> _Value:
        """What stands for a full-sized value: a variable, or a constant."""
        if isinstance(x, Literal):
            return _constant(x)
        if x in self._computed or x in self._kinds:
            return x
        if x in self._same:
            return self._same[x]
        eqn = self.graph.maker.get(x)
        if aval_of(x).shape != self._shape:
            return self._vector(x, aval_of(x).shape)
        dimensions = None if eqn is None else broadcast_dimensions(eqn)
        if eqn is not None and dimensions is not None:
            self._same[x] = self._broadcast(eqn.invars[0], dimensions)
            return self._same[x]
        begins = x in self._stops or x in self.graph.kept
        if eqn is None or begins or not _is_elementwise(eqn):
            if aval_of(x).dtype not in _FLOATS:
                raise _NoChainError
            self._kinds[x] = "matrix"
            return x
        if len(self.order) >= _MOST_STEPS:
            raise _NoChainError
        operands = [self.visit(v) for v in eqn.invars]
        if keeps_all_bits(eqn):
            self._same[x] = operands[0]
            return operands[0]
        self._computed.add(x)
        self.order.append(x)
        return x

    def matrices(self, x: _Value) -> set[Var]:
        """What an operand that no chain computes is: a matrix itself, or none."""
        if isinstance(x, Var) and self._kinds.get(x) == "matrix":
            return {x}
        return set()

    def _broadcast(self, x: Atom, dimensions: tuple[int, ...]) -> _Value:
        constant = self._scalar(x)
        if constant is not None:
            return constant
        shape = [1] * len(self._shape)
        for dim, size in zip(dimensions, aval_of(x).shape, strict=True):
            shape[dim] = size
        return self._vector(x, tuple(shape))

    def _vector(self, x: Atom, shape: tuple[int, ...]) -> _Value:
        """A value that is repeated over one side, of this shape before that."""
        *rows, columns = self._shape
        constant = self._scalar(x)
        if constant is not None:
            return constant
        if shape == (*rows, 1):
            kind: Kind = "rows"
        elif shape in ((*(1 for _ in rows), columns), ()):
            kind = "columns"
        else:
            raise _NoChainError
        known = x if isinstance(x, Var) and aval_of(x).dtype in _FLOATS else None
        if known is None or self._kinds.get(known, kind) != kind:
            raise _NoChainError
        self._kinds[known] = kind
        return known

    def _scalar(self, x: Atom) -> np.generic | None:
        """The constant that a scalar is, perhaps placed or cast; None of all else."""
        while isinstance(x, Var) and getattr(x.aval, "shape", None) == ():
            eqn = self.graph.maker.get(x)
            if eqn is None or not is_placement(eqn):
                return None
            x = eqn.invars[0]
        return _constant(x) if isinstance(x, Literal) else None

    def chain(self, roots: Sequence[Var]) -> Chain | None:
        """What was found; None if a root is no value that the chain computes."""
        if any(root not in self._computed for root in roots):
            return None
        order: tuple[Kind, ...] = ("matrix", "rows", "columns")
        inputs = sorted(self._kinds, key=lambda x: order.index(self._kinds[x]))
        number = {x: i for i, x in enumerate([*inputs, *self.order])}
        steps = []
        for x in self.order:
            eqn = self.graph.maker[x]
            operands = (self.visit(v) for v in eqn.invars)
            numbered = (number[v] if isinstance(v, Var) else v for v in operands)
            name, power = primitive_of(eqn), power_of(eqn)
            steps.append(Step(name, tuple(numbered), aval_of(x).dtype, power))
        function = Elementwise(
            tuple(self._kinds[x] for x in inputs),
            tuple(aval_of(x).dtype for x in inputs),
            tuple(steps),
            tuple(number[root] for root in roots),
        )
        return Chain(function, tuple(inputs))


def may_be_in_chain(eqn: JaxprEqn) -> bool:
    """Whether an equation is elementwise, or repeats what is."""
    return broadcast_dimensions(eqn) is not None or _is_elementwise(eqn)


def _is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether a chain may compute the equation's result."""
    if len(eqn.outvars) != 1 or not has_default_accuracy(eqn):
        return False
    dtype = aval_of(eqn.outvars[0]).dtype
    if dtype not in _FLOATS and dtype != jnp.bool_:
        return False
    if keeps_all_bits(eqn):
        return True
    if is_cast(eqn):
        return dtype in _FLOATS and aval_of(eqn.invars[0]).dtype in _FLOATS
    power = power_of(eqn)
    return primitive_of(eqn) in FUNCTIONS or (power is not None and power >= 2)


def _constant(x: Literal) -> np.generic:
    dtype = jnp.result_type(x.val)
    if np.shape(x.val) != () or dtype not in _FLOATS:
        raise _NoChainError
    return dtype.type(x.val)
