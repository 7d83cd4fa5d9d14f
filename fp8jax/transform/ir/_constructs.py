"""Constructs: equations that run jaxprs of their own, and how values cross into those.

One table says for each primitive what its bodies are, which operand each input of a
body is, and what its results become outside. `Construct.of` takes an equation apart,
its lists of inputs and results are edited, and `Construct.equation` puts it together
again: counts, shardings and specs among its parameters follow from the lists. What is
not in the table is opaque.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.extend import core

from fp8jax import _compat
from fp8jax.transform.ir._jaxprs import jaxprs_of, with_jaxprs

# Of an input: the same in every iteration, carried from one to the next, or a slice of
# an array per iteration. The index of a `cond`, which no branch has, is the choice.
InputKind = Literal["choice", "constant", "carry", "slice"]
# Of a result: as a body returns it, carried out of the last iteration, or stacked.
ResultKind = Literal["value", "carry", "stack"]
# Of a rule that stands beside a body, what it is for.
RuleKind = Literal["derivative", "linear", "partitioning", "batching"]


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """An operand of a construct.

    Attributes:
        operand: outside, a variable or a literal.
        inner: its variable in each body, None in those that do not have it.
        kind: how it crosses.
        params: what the equation's parameters say of this operand alone.
    """

    operand: Any
    inner: tuple[Any, ...]
    kind: InputKind = "constant"
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A result of a construct.

    Attributes:
        outvar: its variable outside.
        inner: what each body returns for it, None for those that return none of it.
        kind: how it crosses.
        params: what the equation's parameters say of this result alone.
    """

    outvar: Any
    inner: tuple[Any, ...]
    kind: ResultKind = "value"
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Construct:
    """An equation that runs jaxprs, taken apart. To change it, replace its fields.

    Invariants: the i-th carried input and the i-th carried result are one carry. Inputs
    and results may stand in any order otherwise: `equation` sorts them by kind.

    Attributes:
        eqn: the equation as it was.
        bodies: its jaxprs, in the order that positions count. Their `eqns` count;
            `invars` and `outvars` are those that `inputs` and `results` name.
        inputs, results: how values cross.
    """

    eqn: Any
    bodies: tuple[Any, ...]
    inputs: tuple[Input, ...]
    results: tuple[Result, ...]

    @classmethod
    def of(cls, eqn: Any) -> "Construct | None":
        """The equation taken apart; None if it is in no table, and so opaque."""
        form = CONSTRUCTS.get(eqn.primitive.name)
        bodies = tuple(jaxprs_of(eqn)) if form is not None else ()
        if form is None or not bodies:
            return None
        inputs, results = form.open(eqn, [_compat.open_jaxpr(b) for b in bodies])
        if inputs is None:
            return None
        return cls(eqn, bodies, tuple(inputs), tuple(results))

    @property
    def rule(self) -> RuleKind | None:
        """The rule beside the body that counts on it, if there is one."""
        return CONSTRUCTS[self.eqn.primitive.name].rule

    @property
    def is_fixed(self) -> bool:
        """Whether its bodies must stay, because a rule counts on them."""
        return self.rule is not None

    @property
    def mesh(self) -> Any:
        """The mesh of a `shard_map`; None of all others."""
        return self.eqn.params["mesh"] if "in_specs" in self.eqn.params else None

    @property
    def length(self) -> int | None:
        """How many iterations there are, if the equation says so."""
        return self.eqn.params.get("length")

    @property
    def takes_inputs(self) -> bool:
        """Whether an operand may be added: no parameter places it on devices."""
        return CONSTRUCTS[self.eqn.primitive.name].takes_inputs

    @property
    def is_plain(self) -> bool:
        """Whether it means no more than its one body's equations."""
        form = CONSTRUCTS[self.eqn.primitive.name]
        constants = _compat.open_jaxpr(self.bodies[0]).constvars
        return form.is_plain(self.eqn.params) and not constants

    @property
    def iterates(self) -> bool:
        """Whether its first body runs several times."""
        return CONSTRUCTS[self.eqn.primitive.name].iterates

    @property
    def chooses(self) -> bool:
        """Whether it runs one of its bodies."""
        return any(x.kind == "choice" for x in self.inputs)

    @property
    def manual_axes(self) -> frozenset[str] | None:
        """Mesh axes over which its body is one device's program; None of most."""
        return None if self.mesh is None else _compat.manual_axes(self.eqn.params)

    def returns(self, body: int) -> bool:
        """Whether a body returns the results; the condition of a loop does not."""
        return CONSTRUCTS[self.eqn.primitive.name].returns(body)

    def visited(
        self, visit: Callable[..., Any], *contexts: Sequence[Any]
    ) -> "Construct":
        """With `visit` of each body, and of its own entry in each of `contexts`.

        A body may come back with other variables, but as many. Not of a construct that
        was edited: its bodies are those of `eqn`, see `settled`.
        """
        bodies = list(map(visit, self.bodies, *contexts))
        if _is_same(bodies, self.bodies):
            return self
        return dataclasses.replace(self, eqn=with_jaxprs(self.eqn, bodies)).reopened()

    def reopened(self) -> "Construct":
        """The equation `eqn`, taken apart anew."""
        construct = Construct.of(self.eqn)
        assert construct is not None, "it is of the same primitive"
        return construct

    def constant(self, operand: Any, inner: Any, body: int = 0) -> Input:
        """A new input that one body reads as it is."""
        return Input(operand, self._only(inner, body))

    def slices(self, operand: Any, inner: Any) -> Input:
        """A new input of which a scan's body reads a slice per iteration."""
        return Input(operand, (inner,), "slice")

    def result(self, *inner: Any) -> Result:
        """A new result: what each body returns, stacked where the construct iterates.

        In a loop of unknown length there is no such result: carry it.
        """
        aval = inner[0].aval
        if self.length is None:
            return Result(core.Var(aval), inner)
        return Result(core.Var(_compat.stacked_aval(aval, self.length)), inner, "stack")

    def _only(self, inner: Any, body: int) -> tuple[Any, ...]:
        return tuple(inner if i == body else None for i, _ in enumerate(self.bodies))

    def with_body(self, body: int, **parts: Any) -> "Construct":
        """With other `eqns` in a body."""
        bodies = list(self.bodies)
        bodies[body] = _compat.with_parts(bodies[body], **parts)
        return dataclasses.replace(self, bodies=tuple(bodies))

    def settled(self) -> "Construct":
        """The same, its bodies with the variables that inputs and results name."""
        return dataclasses.replace(self, eqn=self.equation()).reopened()

    def equation(self) -> Any:
        """The equation of these bodies, inputs and results; `eqn` if they are its own.

        A body whose variables are what they were stays the object that it is, so that
        what several equations share is shared still.
        """
        form = CONSTRUCTS[self.eqn.primitive.name]
        inputs = sorted(self.inputs, key=form.place)
        results = sorted(self.results, key=lambda x: x.kind != "carry")
        bodies = []
        for i, body in enumerate(self.bodies):
            invars = [x.inner[i] for x in inputs if x.inner[i] is not None]
            outvars = [x.inner[i] for x in results if x.inner[i] is not None]
            if not form.returns(i):
                outvars = _compat.open_jaxpr(body).outvars
            bodies.append(_with_variables(body, invars, outvars))
        operands = [x.operand for x in inputs]
        outvars = [x.outvar for x in results]
        old = self.eqn
        same = _is_same(operands, old.invars) and _is_same(outvars, old.outvars)
        if same and _is_same(bodies, jaxprs_of(old)):
            return old
        params = form.counted(old.params, inputs, results)
        params |= _told(old.params, _OF_INPUTS, inputs)
        params |= _told(old.params, _OF_RESULTS, results)
        new = old.replace(invars=operands, outvars=outvars, params=params)
        return with_jaxprs(new, bodies)


def _is_same(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


def _with_variables(body: Any, invars: list[Any], outvars: list[Any]) -> Any:
    inner = _compat.open_jaxpr(body)
    if _is_same(invars, inner.invars) and _is_same(outvars, inner.outvars):
        return body
    return _compat.with_parts(body, invars=invars, outvars=outvars)


# Parameters with an entry for each operand or result, and that of a new one.
_OF_INPUTS: dict[str, Any] = {
    "donated_invars": False,
    "in_layouts": None,
    "in_shardings": _compat.UNSPECIFIED,
    "in_specs": jax.sharding.PartitionSpec(),
    "prevent_cse": True,  # Of remat: a tuple, or one for all.
}
_OF_RESULTS: dict[str, Any] = {
    "out_layouts": None,
    "out_shardings": _compat.UNSPECIFIED,
    "out_specs": jax.sharding.PartitionSpec(),
}


def _params_of(
    params: Mapping[str, Any], table: Mapping[str, Any], count: int
) -> list[dict[str, Any]]:
    """For each of `count` operands or results, its entries in such parameters."""
    known = {
        name: params[name] for name in table if isinstance(params.get(name), tuple)
    }
    return [{name: value[i] for name, value in known.items()} for i in range(count)]


def _told(
    params: Mapping[str, Any], table: Mapping[str, Any], crossings: Sequence[Any]
) -> dict[str, Any]:
    """Such parameters, of these inputs or results."""
    return {
        name: tuple(x.params.get(name, new) for x in crossings)
        for name, new in table.items()
        if isinstance(params.get(name), tuple)
    }


_Opened = tuple[list[Input] | None, list[Result]]


@dataclasses.dataclass(frozen=True)
class _Form:
    """How values cross into one primitive's bodies.

    Attributes:
        kinds: of the inputs of the bodies, for each operand its kind and which bodies
            have it; and for each result its kind.
        counts: the parameters that say how many of each kind there are.
        returns: whether a body returns the results.
        iterates, takes_inputs, rule: as of `Construct`.
        is_plain: whether an equation says no more than which jaxpr it runs.
    """

    kinds: Callable[[Any, int], tuple[list[tuple[InputKind, set[int]]], int]]
    counts: Callable[[dict[str, Any], Sequence[Input], Sequence[Result]], dict] = (
        lambda params, inputs, results: {}
    )
    returns: Callable[[int], bool] = lambda body: True
    iterates: bool = False
    takes_inputs: bool = True
    rule: RuleKind | None = None
    is_plain: Callable[[dict[str, Any]], bool] = lambda params: False

    def open(self, eqn: Any, bodies: Sequence[Any]) -> _Opened:
        kinds, n_carry = self.kinds(eqn, len(bodies))
        told = _params_of(eqn.params, _OF_INPUTS, len(eqn.invars))
        left = [iter(body.invars) for body in bodies]
        inputs = []
        if any(
            len(body.invars) != sum(i in where for _, where in kinds)
            for i, body in enumerate(bodies)
        ):
            return None, []  # Of no form that is known.
        for operand, (kind, where), params in zip(eqn.invars, kinds, told, strict=True):
            inner = tuple(
                next(invars) if i in where else None for i, invars in enumerate(left)
            )
            inputs.append(Input(operand, inner, kind, params))
        told = _params_of(eqn.params, _OF_RESULTS, len(eqn.outvars))
        rest: ResultKind = "stack" if eqn.params.get("length") is not None else "value"
        results = []
        for i, (outvar, params) in enumerate(zip(eqn.outvars, told, strict=True)):
            inner = tuple(
                body.outvars[i] if self.returns(b) else None
                for b, body in enumerate(bodies)
            )
            results.append(
                Result(outvar, inner, "carry" if i < n_carry else rest, params)
            )
        return inputs, results

    def place(self, x: Input) -> tuple[int, bool]:
        """The order of operands: by kind; of constants, a loop's condition's first."""
        rank = ("choice", "constant", "carry", "slice").index(x.kind)
        return rank, x.kind == "constant" and x.inner[0] is not None

    def counted(
        self, params: dict[str, Any], inputs: Sequence[Input], results: Sequence[Result]
    ) -> dict[str, Any]:
        return {**params, **self.counts(params, inputs, results)}


def _of_call(eqn: Any, bodies: int) -> Any:
    return [("constant", {0})] * len(eqn.invars), 0


def _of_cond(eqn: Any, branches: int) -> Any:
    inputs = [("constant", set(range(branches)))] * (len(eqn.invars) - 1)
    return [("choice", set()), *inputs], 0


def _of_scan(eqn: Any, bodies: int) -> Any:
    consts, carry = _compat.scan_counts(eqn.params)
    slices = len(eqn.invars) - consts - carry
    kinds = ["constant"] * consts + ["carry"] * carry + ["slice"] * slices
    return [(kind, {0}) for kind in kinds], carry


def _scan_counts(params: Any, inputs: Any, results: Any) -> dict[str, Any]:
    kinds = [x.kind for x in inputs]
    consts, carry = kinds.count("constant"), kinds.count("carry")
    stacks = sum(x.kind == "stack" for x in results)
    return _compat.with_scan_counts(params, consts, carry, kinds.count("slice"), stacks)


# Of a `while`, in the order of the alphabet, in which positions count them.
_BODY, _CONDITION = 0, 1


def _of_while(eqn: Any, bodies: int) -> Any:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = len(eqn.invars) - n_cond - n_body
    kinds: list[tuple[InputKind, set[int]]] = [("constant", {_CONDITION})] * n_cond
    kinds += [("constant", {_BODY})] * n_body + [("carry", {_BODY, _CONDITION})] * carry
    return kinds, carry


def _while_counts(params: Any, inputs: Any, results: Any) -> dict[str, Any]:
    constants = [x for x in inputs if x.kind == "constant"]
    of_body = sum(x.inner[_BODY] is not None for x in constants)
    return {"body_nconsts": of_body, "cond_nconsts": len(constants) - of_body}


_CALL = _Form(_of_call)
_JIT = _Form(_of_call, takes_inputs=False, is_plain=_compat.is_plain_call)


def _ruled(rule: RuleKind) -> _Form:
    def is_plain(params: dict[str, Any]) -> bool:
        return rule == "derivative"

    return _Form(_of_call, takes_inputs=False, rule=rule, is_plain=is_plain)


CONSTRUCTS: dict[str, _Form] = {
    "checkpoint": _CALL,
    "closed_call": _CALL,
    "cond": _Form(_of_cond),
    "core_call": _CALL,
    "core_closed_call": _CALL,
    "custom_jvp_call": _ruled("derivative"),
    "custom_lin": _ruled("linear"),
    "custom_partitioning": _ruled("partitioning"),
    "custom_vjp_call": _ruled("derivative"),
    "custom_vmap_call": _ruled("batching"),
    "eval_jaxpr": _CALL,
    "jit": _JIT,
    "pjit": _JIT,
    "remat": _CALL,
    "remat2": _CALL,
    "scan": _Form(_of_scan, _scan_counts, iterates=True),
    "shard_map": _Form(_of_call, takes_inputs=False),
    "while": _Form(
        _of_while, _while_counts, returns=lambda body: body == _BODY, iterates=True
    ),
}


def is_construct(eqn: Any) -> bool:
    """Whether the equation's primitive is in the table."""
    return eqn.primitive.name in CONSTRUCTS
