"""`fp8_transform`: the same function, its matrix products in FP8."""

import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.recipes import Recipe, Rule, check_recipe, deepseek_v3
from fp8jax.transform import _nnx
from fp8jax.transform._arguments import (
    ArgumentOptions,
    CallKey,
    has_static_outputs,
    without_marks,
)
from fp8jax.transform._carry import carry_codes
from fp8jax.transform._custom_rules import check_custom_rules, with_custom_rules
from fp8jax.transform._dedupe import dedupe
from fp8jax.transform._devices import spread_of_program
from fp8jax.transform._harvest import harvest
from fp8jax.transform._hoist import hoist
from fp8jax.transform._inline import inline_calls
from fp8jax.transform._interpreter import Flow, rewrite
from fp8jax.transform._leaves import (
    Leaf,
    Weights,
    check_weights,
    leaves_of,
    positional_names,
    weight_mask,
)
from fp8jax.transform._pair import pair
from fp8jax.transform._plan import Plan, make_plan, with_doubts
from fp8jax.transform._policy import Policy
from fp8jax.transform._replace import Replacer
from fp8jax.transform._report import Report
from fp8jax.transform._residuals import residual_bytes
from fp8jax.transform._roles import assign, is_whole_step
from fp8jax.transform._rules import RULES, opaque
from fp8jax.transform._sink import sink, without_unread
from fp8jax.transform._statistics import named_statistics
from fp8jax.transform._stored import StoredOperands
from fp8jax.transform._stored_calls import as_arrays
from fp8jax.transform._values import Dot, Scope

NO_DERIVATIVE = (
    "fp8_transform: products in FP8 have no forward-mode and no second derivative. "
    "Apply fp8_transform outside: fp8_transform(lambda ...: jax.jvp(f, ...)), likewise "
    "for jax.grad of a whole step, jax.hessian and jax.linearize."
)


def fp8_transform(
    fn: Callable[..., Any],
    recipe: Recipe | None = None,
    *,
    rules: Sequence[Rule] = (),
    weights: Weights = None,
    static_argnums: int | Collection[int] = (),
    static_argnames: str | Collection[str] = (),
    donate_argnums: int | Collection[int] = (),
    donate_argnames: str | Collection[str] = (),
    min_dim: int = 128,
    implementation: str | None = None,
    stats: bool = False,
    weight_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    custom_rules: Sequence[str] = (),
) -> "Fp8Function":
    """`fn`, jitted, with its layers' matrix products in FP8.

    `fn` is traced and its program rewritten: every product of an activation and a
    parameter, and in a train step those of its gradients, becomes one in FP8. Nothing
    else changes. Two ways to use it:

    - on a whole train step, jitted or not, that holds its own `jax.grad`: the step's
      forward, recomputed and backward products are told apart and replaced;
    - on a forward function, to be differentiated outside: products become
      `fp8jax.dot_general`, whose gradients follow the recipe.

    What stays as it is has a reason in `.report(*args)`. By default that is embeddings,
    output heads, routers, norms, attention, and the optimizer's own products.

    Args:
        fn: a function of pytrees, which may be a `jax.jit` object: its static and
            donated arguments stay such. Leaves that are no arrays are static. NNX
            modules and optimizers among the arguments are updated in place.
        recipe: of every layer that no rule is about; `recipes.deepseek_v3()` by
            default.
        rules: `recipes.Rule`s, in order, matched with the key path of a layer's weight
            in its argument (`"params/layers_0/up/kernel"` of a TrainState,
            `"layers_0/up/kernel"` of a dict of parameters), the GEMM's role and the
            weight's size. The first match wins; the default skips come after yours.
        weights: which leaves are parameters: a predicate on the path with the
            argument's name first (`"state/params/up/kernel"`), or the numbers or names
            of arguments. By default those that the step differentiates; else those
            under `params` or of type `nnx.Param`; else, in a forward function, those of
            the first argument, if that is a container.
        static_argnums, static_argnames, donate_argnums, donate_argnames: as in
            `jax.jit`.
        min_dim: a weight with fewer input or output features is skipped, unless a rule
            is about it.
        implementation: `"xla"`, `"mosaic_gpu"`, or None for the best one here.
        stats: whether a call returns `(outputs, statistics)`: how well the codes of
            every product in FP8 stand for its operands, `{path: {role: {name: array}}}`
            with the names `sqnr_db`, `underflow`, `saturated` and `amax`, float32. The
            last axis is for the two operands in the order of `Recipe`'s table; axes
            before it are the iterations of the scans around the product.
        weight_dtype: of the arrays that `fn` sees in the place of QTensors among its
            arguments. Products read their codes; what else uses one reads it
            dequantized. For inference: nothing has a derivative through them.
        custom_rules: patterns of names of functions with a `jax.custom_vjp` or
            `jax.custom_jvp`, for a forward function: those that match as a whole are
            rewritten with their gradient rules. In a whole step all are, without it.

    Returns:
        A callable with `fn`'s signature. It is a jitted function: traced once for each
        structure and types of its arguments.

    Raises:
        ValueError: If an argument of `fp8_transform` is none of the above.
    """
    if not callable(fn):
        raise ValueError(f"fp8_transform takes a function, got {fn!r}.")
    if recipe is not None:
        check_recipe("fp8_transform", recipe)
    rules = tuple(rules) if isinstance(rules, Sequence) else (rules,)
    if not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(
            f"fp8_transform takes rules=[fp8jax.recipes.Rule(...), ...], got {rules!r}."
        )
    check_weights(weights)
    if not isinstance(min_dim, int) or min_dim < 0:
        raise ValueError(f"fp8_transform takes min_dim >= 0, got {min_dim!r}.")
    custom_rules = check_custom_rules(custom_rules)
    policy = Policy(
        recipe or deepseek_v3(),
        rules,
        min_dim,
        implementation,
        stats,
        _checked_dtype(weight_dtype),
        custom_rules,
    )
    options = ArgumentOptions.of(
        fn, static_argnums, static_argnames, donate_argnums, donate_argnames
    )
    return Fp8Function(fn, policy, weights, options)


class Fp8Function:
    """What `fp8_transform` returns: call it as the function it was made of."""

    def __init__(
        self,
        fn: Callable[..., Any],
        policy: Policy,
        weights: Weights,
        options: ArgumentOptions,
        describe: Callable[..., list[Leaf]] | None = None,
    ):
        """
        Args:
            fn: the function.
            policy: what is wanted of it.
            weights: which leaves are parameters.
            options: which arguments are static or donated.
            describe: tells the leaves of `(args, kwargs)`.
        """
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._policy = policy
        self._weights: Weights = weights
        self._options = options
        self._describe = describe or self._leaves
        self._without_nnx: set[CallKey] = set()
        self._has_static_outputs = False
        self._pure_functions: dict[_nnx.PureFunction, Fp8Function] = {}

        def run(key: CallKey, donated: list[Any], kept: list[Any]) -> Any:
            return self._run(key, donated, kept)

        self._name = getattr(fn, "__name__", "fp8_transform")
        run.__name__ = run.__qualname__ = self._name
        self._jit = jax.jit(run, static_argnums=0, donate_argnums=1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._options.split(args, kwargs)
        if self._has_nnx(call[0], args, kwargs):
            return self._call_nnx(args, kwargs)
        try:
            outputs = self._jit(*call)
        except TypeError as error:
            if not _is_about_derivatives(error):
                raise
            raise TypeError(NO_DERIVATIVE) from error
        return without_marks(outputs) if self._has_static_outputs else outputs

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What becomes of every matrix product of this call, without running it.

        Args:
            args, kwargs: as for the call; `jax.ShapeDtypeStruct`s will do for arrays.
        """
        key, donated, kept = self._options.split(args, kwargs)
        if self._has_nnx(key, args, kwargs):
            _, function, pure_args = self._pure(args, kwargs)
            return function.report(*pure_args)
        jaxpr, _, plan = self._plan(key, donated, kept)
        if not plan.whole_step:
            return plan.report
        fp8 = self._rewritten(jaxpr, plan, stats=False)
        found = [residual_bytes(program, plan.is_weight) for program in (fp8, jaxpr)]
        return plan.report.with_residuals(*found)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As `jax.jit(fn).lower`, for a look at the compiled program."""
        function, call = self._split(args, kwargs)
        return function.lower(*call)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As `jax.jit(fn).trace`, for a look at the rewritten program."""
        function, call = self._split(args, kwargs)
        return function.trace(*call)

    def _split(self, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function that a call runs, and what it is called with."""
        call = self._options.split(args, kwargs)
        if not self._has_nnx(call[0], args, kwargs):
            return self._jit, call
        _, function, pure_args = self._pure(args, kwargs)
        return function._jit, function._options.split(pure_args, {})

    def _run(self, key: CallKey, donated: list[Any], kept: list[Any]) -> Any:
        # Runs under jit's trace, so jit's own cache is the transform's.
        jaxpr, out_tree, plan = self._plan(key, donated, kept)
        _warn(plan, self._policy, self._name)
        stats = self._policy.stats
        jaxpr = without_unread(self._rewritten(jaxpr, plan, stats))
        self._has_static_outputs |= has_static_outputs(out_tree)
        inputs = [*donated, *kept]
        if not stats:
            outputs = core.jaxpr_as_fun(jaxpr)(*inputs)
            return jax.tree.unflatten(out_tree, outputs)
        jaxpr, where = harvest(jaxpr)
        results = core.jaxpr_as_fun(jaxpr)(*inputs)
        n = out_tree.num_leaves
        statistics = named_statistics(plan.measured, where, results[n:])
        return jax.tree.unflatten(out_tree, results[:n]), statistics

    def _rewritten(self, jaxpr: Any, plan: Plan, stats: bool) -> Any:
        """The program with its products replaced, each code made where it is best."""
        replacer = Replacer(stats)
        jaxpr = carry_codes(rewrite(jaxpr, plan.replacements, replacer))
        jaxpr = hoist(jaxpr, plan.is_weight, replacer.calls)
        return dedupe(pair(jaxpr, plan.is_weight, replacer.calls))

    def _plan(
        self, key: CallKey, donated: list[Any], kept: list[Any]
    ) -> tuple[Any, Any, Plan]:
        """The function's jaxpr, its output's structure, and the plan for it."""

        def flat(donated: list[Any], kept: list[Any]) -> Any:
            arguments = key.arguments(donated, kept)
            (args, kwargs), put_back = as_arrays(arguments, self._policy.weight_dtype)
            return self._options.mark(put_back(self._fn(*args, **kwargs)), key)

        try:
            with _compat.remat_as_jaxpr():
                jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(donated, kept)
        except jax.errors.JAXTypeError as error:
            error.add_note(
                f"fp8_transform({self._name}) traces the function, as jax.jit does: "
                "what it needs as a Python value goes into static_argnums= or "
                "static_argnames=."
            )
            raise
        jaxpr = sink(inline_calls(jaxpr))
        stored = StoredOperands.of(jaxpr)
        leaves = self._ordered_leaves(key, donated, kept)
        flow = Flow(RULES, opaque, closure=1 << len(leaves))
        inputs = [flow.input(i) for i in range(len(leaves))]
        flow.walk(jaxpr, inputs, Scope())
        dots = [flow.dots[position] for position in sorted(flow.dots)]
        mask = weight_mask(self._weights, leaves, dots)
        sizes = [leaf.size for leaf in leaves]

        def decide(
            dots: Sequence[Dot], whole_step: bool, programs: Sequence[Any]
        ) -> Plan:
            found = assign(dots, mask, sizes)
            spread = max(key.spread, *map(spread_of_program, (jaxpr, *programs)))
            plan = make_plan(
                found, leaves, self._policy, whole_step, spread, mask, stored
            )
            return with_doubts(plan, found, leaves, self._policy, told)

        told = self._weights is not None
        whole_step = is_whole_step(dots)
        plan = decide(dots, whole_step, ())
        if self._policy.custom_rules and not whole_step:
            plan = with_custom_rules(plan, flow, self._policy, decide)
        return jaxpr, jax.tree.structure(out), plan

    def _ordered_leaves(
        self, key: CallKey, donated: list[Any], kept: list[Any]
    ) -> list[Leaf]:
        """As the jaxpr takes them: the donated ones first."""
        args, kwargs = key.arguments(donated, kept, with_statics=False)
        static = {i for i, _ in key.statics}
        indices = [i for i in range(key.treedef.num_leaves) if i not in static]
        leaves = dict(zip(indices, self._describe(args, kwargs), strict=True))
        first = [leaves[i] for i in key.donated]
        return first + [leaves[i] for i in indices if i not in key.donated]

    def _leaves(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Leaf]:
        return leaves_of(positional_names(self._fn, len(args)), args, kwargs)

    def _has_nnx(self, key: CallKey, args: Any, kwargs: Any) -> bool:
        if key in self._without_nnx:
            return False
        if _nnx.has_graph_nodes((args, kwargs)):
            return True
        self._without_nnx.add(key)
        return False

    def _call_nnx(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pure, function, pure_args = self._pure(args, kwargs)
        result = function(*pure_args)
        (output, state), *statistics = result if self._policy.stats else (result,)
        pure.update(self._by_name(args, kwargs), state)
        return (output, *statistics) if statistics else output

    def _pure(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_nnx.PureFunction, "Fp8Function", tuple[Any, ...]]:
        """The function without side effects, transformed, and its arguments."""
        by_name = self._by_name(args, kwargs)
        nodes = tuple(n for n, x in by_name.items() if _nnx.has_graph_nodes(x))
        names = tuple(positional_names(self._fn, len(args)))
        pure = _nnx.PureFunction(self._fn, names, nodes)
        if pure not in self._pure_functions:
            options = ArgumentOptions.of(pure, 0, (), (), ())
            self._pure_functions[pure] = Fp8Function(
                pure, self._policy, self._weights, options, pure.leaves
            )
        static = self._options.static_names
        return pure, self._pure_functions[pure], pure.split(by_name, static)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = positional_names(self._fn, len(args))
        return {**dict(zip(names, args, strict=True)), **kwargs}


def _checked_dtype(dtype: Any) -> np.dtype:
    for allowed in ops.INPUT_DTYPES:
        if dtype == allowed:
            return allowed
    raise ValueError(
        f"fp8_transform takes weight_dtype bfloat16, float16 or float32, got {dtype!r}."
    )


def _is_about_derivatives(error: TypeError) -> bool:
    text = str(error)
    ours = ("quantized_dot has no gradient", "dot_general in FP8 has a gradient")
    return "custom_vjp" in text or any(words in text for words in ours)


def _warn(plan: Plan, policy: Policy, name: str) -> None:
    report = plan.report
    for doubt in plan.doubts:
        warnings.warn(
            f"fp8_transform({name}): {doubt} See .report(*args).", stacklevel=2
        )
    for pattern in report.unmatched_rules:
        warnings.warn(
            f"fp8_transform({name}): the rule {pattern!r} matched no layer's weight; "
            "see .report(*args).",
            stacklevel=2,
        )
    for pattern in report.unmatched_custom_rules:
        warnings.warn(
            f"fp8_transform({name}): {pattern!r} in custom_rules is the name of no "
            "function with a custom_vjp or custom_jvp; see .report(*args).",
            stacklevel=2,
        )
    emulated = [
        f"{row.path} ({row.role})" for row in report.rows if row.kernel == "xla"
    ]
    if emulated and policy.implementation is None and ops.has_gpu_kernels():
        others = f" and {len(emulated) - 3} more" if len(emulated) > 3 else ""
        warnings.warn(
            f"fp8_transform({name}): {', '.join(emulated[:3])}{others} run in XLA's "
            "emulation of FP8, many times slower than the GPU kernels; "
            ".report(*args) says why.",
            stacklevel=2,
        )
    if not any(row.status == "fp8" for row in report.rows) and not policy.recipe.is_off:
        warnings.warn(
            f"fp8_transform({name}) found no matrix product to compute in FP8; "
            ".report(*args) says why.",
            stacklevel=2,
        )
