"""Constructs: equations that run jaxprs of their own, and how values cross into those.

`Construct.of` takes an equation apart as the table has it (`_table.py`), its lists of
inputs and results are edited, and `Construct.equation` puts it together again: counts,
shardings and specs among its parameters follow from the lists.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.ir._crossings import Input, Result
from fp8jax.transform.ir._jaxprs import jaxprs_of, with_jaxprs
from fp8jax.transform.ir._table import CONSTRUCTS, RuleKind
from fp8jax.transform.ir._types import AnyJaxpr, Atom


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

    eqn: JaxprEqn
    bodies: tuple[AnyJaxpr, ...]
    inputs: tuple[Input, ...]
    results: tuple[Result, ...]

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "Construct | None":
        """Takes an equation apart; None if the table lacks it, so that it is opaque."""
        form = CONSTRUCTS.get(eqn.primitive.name)
        bodies = tuple(jaxprs_of(eqn)) if form is not None else ()
        # With `jax_remat3` a remat holds an object instead of its jaxpr.
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
        """The mesh of a `shard_map`, else None."""
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
        # Constants hang on the body: written out, its equations would miss them.
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
        """Mesh axes over which a shard_map's body runs on one device, else None."""
        return None if self.mesh is None else _compat.manual_axes(self.eqn.params)

    @property
    def sliced(self) -> dict[Var, Atom]:
        """Maps a variable of a scan's body to the array that it is a slice of."""
        slices = [x for x in self.inputs if x.kind == "slice"]
        return {x.inner[0]: x.operand for x in slices if x.inner[0] is not None}

    def returns(self, body: int) -> bool:
        """Whether a body returns the results; the condition of a loop does not."""
        return CONSTRUCTS[self.eqn.primitive.name].returns(body)

    def visited(
        self, visit: Callable[..., Any], *contexts: Sequence[Any]
    ) -> "Construct":
        """Replaces each body by `visit(body, *its entries in contexts)`.

        A body may come back with other variables, but as many. Not of a construct that
        was edited: its bodies are those of `eqn`, see `settled`.
        """
        bodies = list(map(visit, self.bodies, *contexts))
        # The same object, so that callers see by `is` that nothing changed.
        if _is_same(bodies, self.bodies):
            return self
        # Opened anew: `inputs` and `results` name variables of the bodies as they were.
        return dataclasses.replace(self, eqn=with_jaxprs(self.eqn, bodies)).reopened()

    def reopened(self) -> "Construct":
        """Takes `eqn` apart anew."""
        construct = Construct.of(self.eqn)
        assert construct is not None, "it is of the same primitive"
        return construct

    def constant(self, operand: Atom, inner: Var, body: int = 0) -> Input:
        """Makes an input that one body reads as it is."""
        return Input(operand, self._only(inner, body))

    def slices(self, operand: Atom, inner: Var) -> Input:
        """Makes an input of which a scan's body reads one slice per iteration."""
        return Input(operand, (inner,), "slice")

    def result(self, *inner: Atom) -> Result:
        """Makes a result of what each body returns, stacked if the construct iterates.

        In a loop of unknown length there is no such result: carry it.
        """
        # Branches agree on types: the first one's is all of theirs.
        aval = inner[0].aval
        if self.length is None:
            return Result(core.Var(aval), inner)
        return Result(core.Var(_compat.stacked_aval(aval, self.length)), inner, "stack")

    def _only(self, inner: Var, body: int) -> tuple[Any, ...]:
        return tuple(inner if i == body else None for i, _ in enumerate(self.bodies))

    def with_body(self, body: int, **parts: Any) -> "Construct":
        """Replaces parts of one body, such as its `eqns`."""
        bodies = list(self.bodies)
        bodies[body] = _compat.with_parts(bodies[body], **parts)
        return dataclasses.replace(self, bodies=tuple(bodies))

    def settled(self) -> "Construct":
        """Writes the variables that inputs and results name into the bodies."""
        return dataclasses.replace(self, eqn=self.equation()).reopened()

    def equation(self) -> JaxprEqn:
        """Puts the equation together; returns `eqn` itself if nothing was edited.

        A body whose variables are what they were stays the object that it is, so that
        what several equations share is shared still.
        """
        form = CONSTRUCTS[self.eqn.primitive.name]
        # New ones were appended, and JAX tells kinds apart by their counts alone.
        inputs = sorted(self.inputs, key=form.place)
        results = sorted(self.results, key=lambda x: x.kind != "carry")
        bodies = []
        for i, body in enumerate(self.bodies):
            invars = [x.inner[i] for x in inputs if x.inner[i] is not None]
            outvars = [x.inner[i] for x in results if x.inner[i] is not None]
            # A condition's one result is none of the equation's.
            if not form.returns(i):
                outvars = _compat.open_jaxpr(body).outvars
            bodies.append(_with_variables(body, invars, outvars))
        operands = [x.operand for x in inputs]
        outvars = [x.outvar for x in results]
        old = self.eqn
        same = _is_same(operands, old.invars) and _is_same(outvars, old.outvars)
        if same and _is_same(bodies, jaxprs_of(old)):
            return old
        params = form.params(old.params, inputs, results)
        new = old.replace(invars=operands, outvars=outvars, params=params)
        return with_jaxprs(new, bodies)


def _is_same(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


def _with_variables(body: AnyJaxpr, invars: list[Any], outvars: list[Any]) -> Any:
    inner = _compat.open_jaxpr(body)
    if _is_same(invars, inner.invars) and _is_same(outvars, inner.outvars):
        return body
    return _compat.with_parts(body, invars=invars, outvars=outvars)
