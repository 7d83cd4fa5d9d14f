"""`fp8_transform`: the same function, its matrix products in FP8."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import ops
from fp8jax._described import described
from fp8jax.recipes import Recipe, Rule, recipe_or_default
from fp8jax.transform._custom_rules import check_custom_rules
from fp8jax.transform._pipeline import check_without
from fp8jax.transform._step import Call, Step
from fp8jax.transform.call import (
    CallKey,
    Lowered,
    NnxCall,
    OuterJit,
    Static,
    Traced,
    Weights,
    check_function,
    check_weights,
    filled,
    has_modules,
    name_of,
    outer_jit,
    pure_jit,
    weights_after,
)
from fp8jax.transform.plan import Policy, Report
from fp8jax.transform.profile import Profile

_NOT_GIVEN: Any = object()


@overload
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
    without: Collection[str] = (),
) -> "Fp8Function": ...


@overload
def fp8_transform(
    *, recipe: Recipe | None = None, **options: Any
) -> "Callable[[Callable[..., Any]], Fp8Function]": ...


def fp8_transform(  # pyright: ignore[reportInconsistentOverload]
    fn: Any = _NOT_GIVEN,
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
    without: Collection[str] = (),
) -> Any:
    """`fn`, jitted, with its layers' matrix products in FP8.

    `fn` is traced and its program rewritten: every product of an activation and a
    parameter, and in a train step those of its gradients, becomes one in FP8. Nothing
    else changes. Two ways to use it:

    - on a whole train step, jitted or not, that holds its own `jax.grad`: the step's
      forward, recomputed and backward products are told apart and replaced;
    - on a forward function, to be differentiated outside: products become
      `fp8jax.dot_general`, whose gradients follow the recipe.

    Either is a call or a decorator, of methods too: `@fp8_transform`, or with options
    and without the function, `@fp8_transform(stats=True)`.

    What stays as it is has a reason in `.report(*args)`. By default that is embeddings,
    output heads, routers, norms, attention, and the optimizer's own products.

    Args:
        fn: a function of pytrees. What a `jax.jit`, `nnx.jit` or `eqx.filter_jit`
            around it says of donation, static arguments, shardings and compilation
            holds. Leaves that are no arrays are static. NNX modules and optimizers
            among the arguments are updated in place.
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
            the first argument that is neither static, a number nor a random key, if
            that is a container.
        static_argnums, static_argnames, donate_argnums, donate_argnames: as in
            `jax.jit`, besides those of a jit around `fn`.
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
        without: names of passes over the program that do not run, to find out which one
            is to blame for what one sees: `"hoist"` say. `docs/transform.md` lists them
            and tells which ones change no number.

    Returns:
        A callable with `fn`'s signature. It is a jitted function: traced once for each
        structure and types of its arguments. As an attribute of a class it binds its
        instance, the first argument: static if it is no pytree, as under `jax.jit`.
        Without `fn`, the decorator that gives it.

    Raises:
        ValueError: If an argument of `fp8_transform` is none of the above, or `fn` is
            jitted in a way that cannot be followed.
    """
    options = {k: v for k, v in locals().items() if k != "fn"}  # As they came.
    if fn is _NOT_GIVEN:
        return functools.partial(fp8_transform, **options)
    if isinstance(fn, staticmethod | classmethod):
        return type(fn)(fp8_transform(fn.__func__, **options))
    check_function(fn)
    recipe = recipe_or_default("fp8_transform", recipe)
    rules = tuple(rules) if isinstance(rules, Sequence) else (rules,)
    if not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(
            f"fp8_transform takes rules=[fp8jax.recipes.Rule(...), ...], got "
            f"{described(rules)}."
        )
    check_weights(weights)
    if not isinstance(min_dim, int) or min_dim < 0:
        raise ValueError(f"fp8_transform takes min_dim >= 0, got {min_dim!r}.")
    custom_rules = check_custom_rules(custom_rules)
    policy = Policy(
        recipe,
        rules,
        min_dim,
        implementation,
        stats,
        _checked_dtype(weight_dtype),
        custom_rules,
        check_without(without),
    )
    outer = outer_jit(fn).with_options(
        static_argnums, static_argnames, donate_argnums, donate_argnames
    )
    return Fp8Function(fn, outer, policy, weights_after(weights, len(outer.args)))


class Fp8Function:
    """What `fp8_transform` returns: call it as the function it was made of."""

    def __init__(
        self, fn: Callable[..., Any], outer: OuterJit, policy: Policy, weights: Weights
    ):
        """
        Args:
            fn: the function.
            outer: the function within, and how it is to be jitted.
            policy: what is wanted of it.
            weights: which leaves are parameters, of `outer.fn`'s arguments.
        """
        functools.update_wrapper(self, fn, updated=())
        self.__wrapped__ = fn
        self._outer = outer
        self._policy = policy
        self._weights: Weights = weights
        self._step = Step(outer, policy, weights)
        self._without_modules: set[CallKey] = set()
        self._nnx_steps: dict[Hashable, Step] = {}

    def __repr__(self) -> str:
        return f"fp8_transform({name_of(self.__wrapped__)})"

    def __get__(self, instance: Any, owner: type | None = None) -> "Fp8Function":
        """The method of an instance; what is traced and compiled is for all of them."""
        if instance is None:
            return self
        bound = copy.copy(self)
        args = (*self._outer.args, instance)
        bound._outer = dataclasses.replace(self._outer, args=args)
        if hasattr(self.__wrapped__, "__get__"):  # For its signature.
            bound.__wrapped__ = self.__wrapped__.__get__(instance, owner)
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, call, modules = self._prepared(*self._complete(args, kwargs))
        return self._finished(step(call), modules)

    @property
    def outer_jit(self) -> OuterJit:
        """How this function is jitted: for another transform, which then does it."""
        results = self._outer.out_shardings
        if self._policy.stats and results is not None:
            results = (results, None)
        return dataclasses.replace(
            self._outer, fn=self._unjitted, out_shardings=results
        )

    def _unjitted(self, *args: Any, **kwargs: Any) -> Any:
        step, call, modules = self._prepared(args, kwargs)
        return self._finished(step.unjitted(call), modules)

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What becomes of every matrix product of this call, without running it.

        Args:
            args, kwargs: as for the call; `jax.ShapeDtypeStruct`s will do for arrays.
        """
        step, call, _ = self._prepared(*self._complete(args, kwargs))
        return step.report(call)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Where this call's time goes on the GPU: the times of kernels, by product.

        The step is compiled once more, without CUDA graphs and with its products
        marked, and run five times, three of them under `jax.profiler`. Its results are
        dropped, and the arguments stay as they are: what the step donates is copied
        for each run, which takes as much memory again. NNX modules are not updated.

        Args:
            args, kwargs: as for the call.

        Raises:
            RuntimeError: Where no GPU is, or a profile is already being taken.
            ValueError: If an argument stands for an array and is none.
        """
        step, call, _ = self._prepared(*self._complete(args, kwargs))
        return step.profile(call)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As `jax.jit(fn).lower`, to look at the program or to compile it now.

        What `.compile()` gives is called as the function, less static arguments.
        """
        return self._ahead(Lowered, "lower", args, kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As `jax.jit(fn).trace`, for a look at the rewritten program."""
        return self._ahead(Traced, "trace", args, kwargs)

    def _ahead(
        self,
        wrapper: type[Traced] | type[Lowered],
        stage: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        args, kwargs = self._complete(args, kwargs)
        step, call, modules = self._prepared(args, kwargs)
        made = step.ahead(stage, call)
        options, outer = self._step.options, self._outer
        is_plain = modules is None and not outer.args and not outer.kwargs
        is_plain &= options.all_arrays(args, kwargs) and not step.has_static_outputs
        if is_plain:
            return made
        # No array of this call may live on with what is compiled.
        key, count = call[0], len(args)
        known = {*options.static.numbers, *range(len(outer.args))}
        told = {i: x for i, x in enumerate(args) if i in known}
        named = {name: kwargs[name] for name in options.static.names & kwargs.keys()}

        def run(
            compiled: jax.stages.Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            args = filled(args, told, count)
            kwargs = {**outer.kwargs, **named, **kwargs}
            _, call, modules = self._prepared(args, kwargs)
            return self._finished(step.run_compiled(compiled, key, call), modules)

        return wrapper(made, run)

    def _complete(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """With what partial application gave the function before."""
        return (*self._outer.args, *args), {**self._outer.kwargs, **kwargs}

    def _prepared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Step, Call, NnxCall | None]:
        """The step that a call runs, what it is called with, and modules to update."""
        call = self._step.split(args, kwargs)
        key = call[0]
        if key in self._without_modules:
            return self._step, call, None
        if not has_modules((args, kwargs)):
            self._without_modules.add(key)
            return self._step, call, None
        modules = NnxCall.of(*self._step.options.with_statics(args, kwargs))
        graphdef = Static(modules.graphdef)
        step = self._nnx_step(modules, graphdef)
        return step, step.split((graphdef, *modules.args), modules.kwargs), modules

    def _nnx_step(self, modules: NnxCall, graphdef: Static) -> Step:
        """The function of arrays that an NNX function is, for modules like these."""
        kind = None
        if self._outer.in_shardings is not None:  # They say something of each module.
            kind = graphdef, jax.tree.structure((modules.args, modules.kwargs))
        if kind not in self._nnx_steps:
            outer = pure_jit(self._outer, modules)
            pure: Any = outer.fn
            self._nnx_steps[kind] = Step(
                outer, self._policy, self._weights, pure.leaves
            )
        return self._nnx_steps[kind]

    def _finished(self, result: Any, modules: NnxCall | None) -> Any:
        """A step's result, once modules have their new arrays."""
        if modules is None:
            return result
        results, *statistics = result if self._policy.stats else (result,)
        output, states, changed = results
        modules.update(states, changed)
        return (output, *statistics) if statistics else output


def _checked_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    for allowed in ops.INPUT_DTYPES:
        if dtype == allowed:
            return allowed
    raise ValueError(
        f"fp8_transform takes weight_dtype bfloat16, float16 or float32, got {dtype!r}."
    )
