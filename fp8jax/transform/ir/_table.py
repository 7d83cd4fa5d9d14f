"""The table of constructs: how values cross into the bodies of each primitive.

What is not in the table is opaque. A construct that JAX adds, or whose parameters
change with a version of it, is a line here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform.ir._crossings import Input, InputKind, Result, ResultKind

# Of a rule that stands beside a body, what it is for.
RuleKind = Literal["derivative", "linear", "partitioning", "batching"]


# Parameters with an entry per operand or result, and the entry of a new one. Those that
# are no tuple hold for all operands, and need no entry.
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


def _entries(
    params: Mapping[str, Any], table: Mapping[str, Any], count: int
) -> list[dict[str, Any]]:
    """Splits such parameters into one entry per operand or result."""
    known = {
        name: params[name] for name in table if isinstance(params.get(name), tuple)
    }
    return [{name: value[i] for name, value in known.items()} for i in range(count)]


def _told(
    params: Mapping[str, Any], table: Mapping[str, Any], crossings: Sequence[Any]
) -> dict[str, Any]:
    """Joins the entries of these inputs or results to such parameters again."""
    return {
        name: tuple(x.params.get(name, new) for x in crossings)
        for name, new in table.items()
        if isinstance(params.get(name), tuple)
    }


_Opened = tuple[list[Input] | None, list[Result]]


@dataclasses.dataclass(frozen=True)
class Form:
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

    def open(self, eqn: JaxprEqn, bodies: Sequence[Any]) -> _Opened:
        kinds, n_carry = self.kinds(eqn, len(bodies))
        told = _entries(eqn.params, _OF_INPUTS, len(eqn.invars))
        left = [iter(body.invars) for body in bodies]
        inputs = []
        # A form that another JAX gave the primitive: left alone rather than misread.
        if any(
            len(body.invars) != sum(i in where for _, where in kinds)
            for i, body in enumerate(bodies)
        ):
            return None, []
        for operand, (kind, where), params in zip(eqn.invars, kinds, told, strict=True):
            inner = tuple(
                next(invars) if i in where else None for i, invars in enumerate(left)
            )
            inputs.append(Input(operand, inner, kind, params))
        told = _entries(eqn.params, _OF_RESULTS, len(eqn.outvars))
        # Only a scan says how long it is; what a `while` returns is all carried.
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
        # JAX's own order, which the counts among the parameters rely on.
        rank = ("choice", "constant", "carry", "slice").index(x.kind)
        return rank, x.kind == "constant" and x.inner[0] is not None

    def params(
        self, old: dict[str, Any], inputs: Sequence[Input], results: Sequence[Result]
    ) -> dict[str, Any]:
        """The equation's parameters, of these inputs and results."""
        return {
            **old,
            **self.counts(old, inputs, results),
            **_told(old, _OF_INPUTS, inputs),
            **_told(old, _OF_RESULTS, results),
        }


def _of_call(eqn: JaxprEqn, bodies: int) -> Any:
    return [("constant", {0})] * len(eqn.invars), 0


def _of_cond(eqn: JaxprEqn, branches: int) -> Any:
    inputs = [("constant", set(range(branches)))] * (len(eqn.invars) - 1)
    return [("choice", set()), *inputs], 0


def _of_scan(eqn: JaxprEqn, bodies: int) -> Any:
    consts, carry = _compat.scan_counts(eqn.params)
    slices = len(eqn.invars) - consts - carry
    kinds = ["constant"] * consts + ["carry"] * carry + ["slice"] * slices
    return [(kind, {0}) for kind in kinds], carry


def _scan_counts(
    params: dict[str, Any], inputs: Sequence[Input], results: Sequence[Result]
) -> dict[str, Any]:
    kinds = [x.kind for x in inputs]
    consts, carry = kinds.count("constant"), kinds.count("carry")
    stacks = sum(x.kind == "stack" for x in results)
    return _compat.with_scan_counts(params, consts, carry, kinds.count("slice"), stacks)


# Of a `while`, in the order of the alphabet, in which positions count them.
_BODY, _CONDITION = 0, 1


def _of_while(eqn: JaxprEqn, bodies: int) -> Any:
    # The condition's constants come first, though its jaxpr counts second.
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = len(eqn.invars) - n_cond - n_body
    kinds: list[tuple[InputKind, set[int]]] = [("constant", {_CONDITION})] * n_cond
    kinds += [("constant", {_BODY})] * n_body + [("carry", {_BODY, _CONDITION})] * carry
    return kinds, carry


def _while_counts(
    params: Mapping[str, Any], inputs: Sequence[Input], results: Sequence[Result]
) -> dict[str, Any]:
    constants = [x for x in inputs if x.kind == "constant"]
    of_body = sum(x.inner[_BODY] is not None for x in constants)
    return {"body_nconsts": of_body, "cond_nconsts": len(constants) - of_body}


_CALL = Form(_of_call)
# A jit's shardings, layouts and donation are the user's words on each operand.
_JIT = Form(_of_call, takes_inputs=False, is_plain=_compat.is_plain_call)


def _ruled(rule: RuleKind) -> Form:
    # Where derivatives are taken their rules are spent, and the body is all that is
    # left; how to split or batch it is needed after that.
    def is_plain(params: dict[str, Any]) -> bool:
        return rule == "derivative"

    return Form(_of_call, takes_inputs=False, rule=rule, is_plain=is_plain)


# Primitives of all versions that are supported: what one of them lacks never matches.
CONSTRUCTS: dict[str, Form] = {
    "checkpoint": _CALL,
    "closed_call": _CALL,
    "cond": Form(_of_cond),
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
    "scan": Form(_of_scan, _scan_counts, iterates=True),
    "shard_map": Form(_of_call, takes_inputs=False),
    "while": Form(
        _of_while, _while_counts, returns=lambda body: body == _BODY, iterates=True
    ),
}


def is_construct(eqn: JaxprEqn) -> bool:
    """Whether the equation's primitive is in the table."""
    return eqn.primitive.name in CONSTRUCTS
