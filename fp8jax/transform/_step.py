"""A function of pytrees, traced, planned, rewritten and jitted again."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.sharding import PartitionSpec

from fp8jax import _compat, numerics, ops
from fp8jax.transform._custom_rules import with_custom_rules
from fp8jax.transform._pipeline import lowered, prepared
from fp8jax.transform._splits import splits_of, told_placement
from fp8jax.transform.analysis import (
    RULES,
    Dot,
    Flow,
    StoredOperands,
    assign,
    is_whole_step,
    opaque,
    parameters_of,
    residual_bytes,
    spread_of_program,
    weight_mask,
)
from fp8jax.transform.call import (
    ArgumentOptions,
    CallKey,
    Dequantize,
    Leaf,
    OuterJit,
    Weights,
    as_arrays,
    has_static_outputs,
    jit_step,
    leaves_of,
    lost_donation,
    name_of,
    positional_names,
    refusing_compiler_options,
    without_marks,
)
from fp8jax.transform.ir import AnyJaxpr, equations
from fp8jax.transform.lower import Program
from fp8jax.transform.plan import (
    Plan,
    Policy,
    Report,
    doubting,
    found_rules,
    make_plan,
    named_statistics,
    warn,
    with_doubts,
)
from fp8jax.transform.profile import Profile, check_measurable, measured, tagged

NO_DERIVATIVE = (
    "fp8_transform: products in FP8 have no forward-mode and no second derivative. "
    "Apply fp8_transform outside: fp8_transform(lambda ...: jax.jvp(f, ...)), likewise "
    "for jax.grad of a whole step, jax.hessian and jax.linearize."
)

# A call's key, and its arguments with None for all that is static.
Call = tuple[CallKey, tuple[Any, ...], dict[str, Any]]


class Step:
    """A function of pytrees, jitted as it was, with its products in FP8.

    Attributes:
        outer: the function, and how it is jitted.
        options: which arguments are static.
        has_static_outputs: whether results of calls so far hold a `StaticOutput`.
    """

    def __init__(
        self,
        outer: OuterJit,
        policy: Policy,
        weights: Weights,
        describe: Callable[..., list[Leaf]] | None = None,
    ):
        """
        Args:
            outer: the function, and how it is to be jitted.
            policy: what is wanted of it.
            weights: which leaves are parameters.
            describe: tells the leaves of `(args, kwargs)`.
        """
        self.outer = outer
        self.options = ArgumentOptions(
            outer.static, outer.static_scalars, placed=outer.in_shardings is not None
        )
        self.has_static_outputs = False
        self._policy = policy
        self._weights: Weights = weights
        self._describe = describe or self._leaves
        self._name = name_of(outer.fn)

    @functools.cached_property
    def jit(self) -> Any:
        """The jitted function `(key, *args, **kwargs)`."""
        return self._jitted(tags=False)

    def _jitted(self, tags: bool) -> Any:
        def run(key: CallKey, /, *args: Any, **kwargs: Any) -> Any:
            return self._run(key, args, kwargs, tags)

        run.__name__ = run.__qualname__ = self._name
        return jit_step(run, self.outer, self._policy.stats)

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return self.options.split(args, kwargs)

    def unjitted(self, call: Call) -> Any:
        """The function's results, computed within what is being traced."""
        return self.finished(self._run(*call))

    def __call__(self, call: Call) -> Any:
        key, args, kwargs = call
        try:
            if not self.outer.quiet:
                return self.finished(self.jit(key, *args, **kwargs))
            with warnings.catch_warnings():
                message = "Some donated buffers were not usable"
                warnings.filterwarnings("ignore", message=message)
                return self.finished(self.jit(key, *args, **kwargs))
        except TypeError as error:
            if not _is_about_derivatives(error):
                raise
            raise TypeError(NO_DERIVATIVE) from error

    def finished(self, outputs: Any) -> Any:
        """Results of `jit` as the function gives them."""
        return without_marks(outputs) if self.has_static_outputs else outputs

    def ahead(self, stage: str, call: Call) -> Any:
        """What `jit.trace` or `jit.lower` makes of a call."""
        key, args, kwargs = call
        return getattr(self.jit, stage)(key, *args, **kwargs)

    def run_compiled(
        self, compiled: jax.stages.Compiled, was: CallKey, call: Call
    ) -> Any:
        """The function's results, by what was compiled for a call of this key.

        Raises:
            TypeError: If this call differs in its structure or in what is static.
        """
        key, args, kwargs = call
        if was.treedef != key.treedef:
            raise TypeError(
                f"fp8_transform({self._name}) was compiled for arguments of the "
                f"structure {was.treedef}, got {key.treedef}."
            )
        if was.statics != key.statics:
            raise TypeError(
                f"fp8_transform({self._name}) was compiled for other leaves that are "
                "no arrays, such as activations or the graph of an NNX module, which "
                "are a part of the program."
            )
        args, kwargs = self.options.dynamic(args, kwargs)
        return self.finished(compiled(*args, **kwargs))

    def report(self, call: Call) -> Report:
        """What becomes of every matrix product of this call, without running it.

        Raises:
            ValueError: For arrays of symbolic dimensions, whose products have no sizes.
        """
        _, args, kwargs = call
        arrays = [x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "shape")]
        symbolic = [x.shape for x in arrays if numerics.is_symbolic(x)]
        if symbolic:
            raise ValueError(
                f"fp8_transform({self._name}).report takes arguments of known sizes, "
                f"got {', '.join(map(str, symbolic))}: give it those of one batch, "
                "whose program it is as well."
            )
        jaxpr, _, plan = self._plan(*call)
        if not plan.whole_step:
            return plan.report
        fp8 = self._lowered(jaxpr, plan, measures=False).jaxpr
        found = [residual_bytes(program, plan.is_weight) for program in (fp8, jaxpr)]
        return plan.report.with_residuals(*found)

    def profile(self, call: Call) -> Profile:
        """The times of all kernels of this call, by product."""
        key, args, kwargs = call
        check_measurable(self._name, args, kwargs)
        lowered = self._jitted(tags=True).lower(key, *args, **kwargs)
        dynamic = self.options.dynamic(args, kwargs)
        return measured(lowered, *dynamic, self.report(call), self._name)

    def _run(
        self,
        key: CallKey,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tags: bool = False,
    ) -> Any:
        # Runs under jit's trace, so jit's own cache is the transform's.
        jaxpr, out_tree, plan = self._plan(key, args, kwargs)
        warn(plan, self._policy, self._name)
        jaxpr = tagged(jaxpr, plan.positions) if tags else jaxpr
        stats = self._policy.stats
        program = self._lowered(jaxpr, plan, stats)
        self.has_static_outputs |= has_static_outputs(out_tree)
        results = core.jaxpr_as_fun(program.jaxpr)(*jax.tree.leaves((args, kwargs)))
        if not stats:
            return jax.tree.unflatten(out_tree, results)
        n = out_tree.num_leaves
        statistics = named_statistics(plan.measured, program.collected, results[n:])
        return jax.tree.unflatten(out_tree, results[:n]), statistics

    # Under `jax.disable_jit` too: our own calls are known by their jits' names.
    @jax.disable_jit(False)
    def _lowered(self, jaxpr: AnyJaxpr, plan: Plan, measures: bool) -> Program:
        """The program in FP8, each code made where it is best."""
        program = Program(jaxpr, plan.is_weight, plan.replacements, measures)
        return lowered(program, self._policy.without)

    @jax.disable_jit(False)
    def _plan(
        self, key: CallKey, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any, Plan]:
        """The function's jaxpr, its output's structure, and the plan for it."""

        stored_calls: list[Dequantize] = []

        def traced(*args: Any, **kwargs: Any) -> Any:
            arguments = key.arguments(jax.tree.leaves((args, kwargs)))
            dtype = self._policy.weight_dtype
            (args, kwargs), made, put_back = as_arrays(arguments, dtype)
            stored_calls[:] = made
            outputs = put_back(self.outer.fn(*args, **kwargs))
            return self.options.mark(outputs, key)

        try:
            with _compat.remat_as_jaxpr(), refusing_compiler_options(self.outer):
                # For JAX's errors: function and arguments by the user's names.
                functools.update_wrapper(traced, self.outer.fn, updated=())
                trace = jax.make_jaxpr(traced, return_shape=True)
                jaxpr, out = trace(*args, **kwargs)
        except TypeError as error:
            if isinstance(error, jax.errors.JAXTypeError) or _is_about_tracing(error):
                error.add_note(
                    f"fp8_transform({self._name}) traces the function, as jax.jit "
                    "does: what it needs as a Python value goes into static_argnums= "
                    "or static_argnames=."
                )
            raise
        lost = lost_donation(jaxpr, self.outer)
        program = Program(jaxpr)
        first = [eqn for eqn in equations(jaxpr) if ops.mark_of(eqn) is not None]
        for eqn, call in zip(
            first, stored_calls, strict=False
        ):  # Made before all else.
            program.calls.add(eqn, call)
        program = prepared(program, self._policy.without)
        jaxpr = program.jaxpr
        stored = StoredOperands.of(jaxpr, program.calls)
        leaves = self._describe(args, kwargs)
        flow = _flow(jaxpr, len(leaves))
        dots = [flow.dots[position] for position in sorted(flow.dots)]
        evidence = flow.updated, flow.returned
        mask = weight_mask(self._weights, leaves, dots, *evidence)

        def decide(
            dots: Sequence[Dot], whole_step: bool, programs: Sequence[Any]
        ) -> Plan:
            found = assign(dots, parameters_of(mask, dots, leaves))
            told = map(_spread_of, self.outer.shardings)
            in_program = map(spread_of_program, (jaxpr, *programs))
            spread = max(key.spread, *told, *in_program)
            placement = key.placement
            if self.options.placed:
                placement = told_placement(self.outer.in_shardings, args)
            splits = splits_of(placement, self.outer.shardings, jaxpr, mask)
            rules = found_rules(flow.readers, found, leaves)
            policy = dataclasses.replace(self._policy, found=rules)
            # Of a gradient rule's program, positions are its own.
            known = StoredOperands({}, frozenset()) if programs else stored
            plan = make_plan(
                found, leaves, policy, whole_step, spread, splits, mask, known
            )
            is_told = self._weights is not None
            return with_doubts(plan, found, leaves, policy, is_told)

        whole_step = is_whole_step(dots)
        plan = decide(dots, whole_step, ())
        if self._policy.custom_rules and not whole_step:
            plan = with_custom_rules(plan, flow, self._policy, decide)
        return jaxpr, jax.tree.structure(out), doubting(plan, lost)

    def _leaves(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Leaf]:
        return leaves_of(positional_names(self.outer.fn, len(args)), args, kwargs)


def _flow(jaxpr: AnyJaxpr, n_leaves: int) -> Flow:
    """A program, walked: a second time by its names alone, if that has to be."""
    for trusts_names in (False, True):
        flow = Flow(RULES, opaque, 1 << n_leaves, trusts_names)
        flow.run(jaxpr)
        # Where a result of the forward pass is the cotangent, as in `vjp(f, x)[1](y)`,
        # all of the backward pass looks like a recomputation.
        if not flow.phases.overrules or is_whole_step([*flow.dots.values()]):
            break
    return flow


def _spread_of(sharding: jax.sharding.Sharding | PartitionSpec) -> ops.Spread:
    """Over how many devices what the jit says of an array spreads it."""
    if isinstance(sharding, PartitionSpec):  # On the mesh in context.
        mesh = jax.sharding.get_abstract_mesh()
        return ops.Spread.MANY if mesh.empty else ops.spread_of_mesh(mesh)
    return ops.spread_of_sharding(sharding)


def _is_about_tracing(error: TypeError) -> bool:
    return "static_argnums" in str(error)  # As of shapes that are no Python numbers.


def _is_about_derivatives(error: TypeError) -> bool:
    text = str(error)
    ours = ("quantized_dot has no gradient", "dot_general in FP8 has a gradient")
    return "custom_vjp" in text or any(words in text for words in ours)
