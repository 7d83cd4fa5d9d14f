"""What the jit around a function says: which arguments are static or donated, where
arrays lie, how it is compiled.

The function within is what `fp8_transform` traces; what becomes of it is jitted as the
function was (`_jit_step`). So every option that `jax.jit` has stays what it was.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from fp8jax import _compat
from fp8jax.transform.call._arguments import StaticScalars
from fp8jax.transform.call._bound import holds_arrays, is_model
from fp8jax.transform.call._equinox import is_of_equinox
from fp8jax.transform.call._parameters import NONE, Chosen, chosen, completed, name_of

NO_PARTIAL = (
    "fp8_transform takes no nnx.{0} of {1}, whose modules it cannot update: give it "
    "functools.partial(nnx.jit({1}), ...) instead."
)


@dataclasses.dataclass(frozen=True)
class OuterJit:
    """A function and how it is to be jitted.

    Attributes:
        fn: the function, not jitted.
        static, donated: arguments.
        in_shardings: of each positional argument, None for static ones; or one for all.
        out_shardings: as in `jax.jit`.
        others: keyword arguments of `jax.jit` about anything else.
        jit: `jax.jit` or `pjit`.
        is_jitted: whether the user jitted it.
        args, kwargs: what partial application gives it before a call's own arguments.
        static_scalars: which Python numbers are static, too.
        quiet: whether to say nothing of donated arrays of which no result can take
            the place.
    """

    fn: Callable[..., Any]
    static: Chosen = NONE
    donated: Chosen = NONE
    in_shardings: Any = None
    out_shardings: Any = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    jit: Callable[..., Any] = jax.jit
    is_jitted: bool = True
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    static_scalars: StaticScalars = "none"
    quiet: bool = False

    def with_options(
        self,
        static_argnums: int | Collection[int],
        static_argnames: str | Collection[str],
        donate_argnums: int | Collection[int],
        donate_argnames: str | Collection[str],
    ) -> "OuterJit":
        """With those of `fp8_transform` besides, whose numbers do not count `args`.

        Raises:
            ValueError: If they are of no argument, or static and donated at once.
        """
        fn, bound = self.fn, len(self.args)
        static = chosen("static", static_argnums, static_argnames, fn, bound)
        donated = chosen("donate", donate_argnums, donate_argnames, fn, bound)
        static, donated = static | self.static, donated | self.donated
        both = static.numbers & donated.numbers or static.names & donated.names
        if both:
            raise ValueError(
                f"fp8_transform({name_of(self.fn)}) takes an argument as static or as "
                f"donated, got both for {', '.join(sorted(map(str, both)))}."
            )
        return dataclasses.replace(self, static=static, donated=donated)

    @property
    def shardings(self) -> list[Any]:
        """All that arguments and results are told to have."""
        both = self.in_shardings, self.out_shardings
        return [getattr(s, "sharding", s) for s in jax.tree.leaves(both)]


def outer_jit(fn: Callable[..., Any]) -> OuterJit:
    """What the outermost jit of `fn` says; the defaults for a function without.

    Partial application of a jitted function, and a method that is one, give it
    arguments like a call's own. So do those of a plain function, and a model that is
    called itself, where they hold arrays: those would be constants else.

    Raises:
        ValueError: If `fn` is jitted in a way that cannot be followed.
    """
    inner, args, kwargs = _unbound(fn)
    if is_model(inner):
        inner, args = _call_of(inner), (inner, *args)
    found = _jitted(inner)
    if found is None:
        scalars = "all" if is_of_equinox(fn) else "in Equinox modules"
        found = OuterJit(fn, is_jitted=False, static_scalars=scalars)
        given = {name: x for name, x in kwargs.items() if holds_arrays(x)}
        if not holds_arrays(args if args else given):
            return found
        left = {name: x for name, x in kwargs.items() if name not in given}
        inner = functools.partial(inner, **left) if left else inner
        return dataclasses.replace(found, fn=inner, args=args, kwargs=given)
    args, kwargs = (*found.args, *args), {**found.kwargs, **kwargs}
    return dataclasses.replace(found, args=args, kwargs=kwargs)


def _unbound(fn: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    args, kwargs = (), {}
    while True:
        if isinstance(fn, types.MethodType):
            fn, args = fn.__func__, (fn.__self__, *args)
        elif isinstance(fn, functools.partial) or _is_partial_of_equinox(fn):
            args, kwargs = (*fn.args, *args), {**fn.keywords, **kwargs}
            fn = fn.func
        else:
            return fn, args, kwargs


def _call_of(model: Any) -> Callable[..., Any]:
    """What calling a model runs, as a function of the model first."""
    call = type(model).__call__
    if _jitted(call) is not None:
        return call

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    run.__name__ = run.__qualname__ = type(model).__name__
    return run


def _is_partial_of_equinox(fn: Any) -> bool:
    names = ("func", "args", "keywords")
    return is_of_equinox(fn) and all(hasattr(fn, name) for name in names)


def _jitted(fn: Any) -> OuterJit | None:
    if isinstance(of_fp8 := getattr(fn, "outer_jit", None), OuterJit):
        return of_fp8
    module = type(fn).__module__
    if module.startswith("flax.nnx.") and hasattr(fn, "jitted_fn"):
        return _of_nnx(fn)
    if is_of_equinox(fn) and hasattr(fn, "donate_first"):
        return _of_equinox(fn)
    if getattr(fn, "__globals__", {}).get("__name__") == "flax.nnx.graphlib":
        raise ValueError(NO_PARTIAL.format("cached_partial", name_of(fn)))
    if (pmap := _compat.pmap_options(fn)) is not None:
        return _of_pmap(fn, pmap)
    if (options := _compat.jit_options(fn)) is not None:
        return _of_jax(fn.__wrapped__, options)
    return _of_wrapper(fn)


def _of_jax(fn: Callable[..., Any], options: _compat.JitOptions) -> OuterJit:
    static = Chosen(
        frozenset(options.static_argnums), frozenset(options.static_argnames)
    )
    donated = Chosen(
        frozenset(options.donate_argnums), frozenset(options.donate_argnames)
    )
    in_shardings = options.in_shardings
    if isinstance(in_shardings, tuple):
        in_shardings = list(in_shardings)
        for number in sorted(static.numbers):
            in_shardings.insert(number, None)
        in_shardings = tuple(in_shardings)
    return OuterJit(
        fn,
        completed(static, fn),
        completed(donated, fn),
        in_shardings,
        options.out_shardings,
        options.others,
        options.jit,
    )


def _of_nnx(fn: Any) -> OuterJit:
    if isinstance(getattr(fn, "partial_args", ()), list):
        raise ValueError(NO_PARTIAL.format("jit_partial", name_of(fn)))
    results = jax.tree.leaves(fn.out_shardings)
    if any(type(s).__name__ == "StateSharding" for s in results):
        raise ValueError(
            f"fp8_transform({name_of(fn)}) takes no nnx.StateSharding in "
            "out_shardings: modules among the arguments stay where in_shardings puts "
            "them."
        )
    options = _compat.jit_options(fn.jitted_fn)
    assert options is not None, "nnx.jit is a jax.jit of a function of arrays"
    # NNX keeps those of static arguments in their places, and its own are as given.
    shardings = fn.in_shardings
    return dataclasses.replace(
        _of_jax(fn.fun, options),
        in_shardings=tuple(shardings) if isinstance(shardings, list) else shardings,
        out_shardings=fn.out_shardings,
    )


def _of_equinox(fn: Any) -> OuterJit:
    options = _compat.jit_options(fn._cached)
    assert options is not None, "filter_jit is a jax.jit of a function of arrays"
    if fn.donate_rest and jax.tree.leaves(fn._dynamic_fun):
        raise ValueError(
            f"fp8_transform({name_of(fn)}) takes no filter_jit of a module that "
            "donates the module's own arrays: make the module an argument."
        )
    parameters = list(inspect.signature(fn).parameters.values())
    donated = [
        i
        for i, _ in enumerate(parameters)
        if (fn.donate_rest if i else fn.donate_first)
    ]
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    if any(parameters[i].kind in several for i in donated):
        raise ValueError(
            f"fp8_transform({name_of(fn)}) takes filter_jit with donate= of functions "
            f"that name their arguments, got {name_of(fn)}{inspect.signature(fn)}."
        )
    names = frozenset(parameters[i].name for i in donated)
    return OuterJit(
        fn.__wrapped__,
        donated=Chosen(frozenset(donated), names),
        others=options.others,
        static_scalars="all",
        quiet=fn.filter_warning,
    )


def _of_pmap(fn: Any, options: _compat.PmapOptions) -> OuterJit:
    if options.donates or options.static_broadcasted_argnums:
        raise ValueError(
            f"fp8_transform takes no jax.pmap({name_of(fn)}) with donate_argnums or "
            "static_broadcasted_argnums, which would be lost: put it inside, as "
            "jax.pmap(fp8_transform(fn, static_argnums=...), ...)."
        )
    return OuterJit(fn)


def _of_wrapper(fn: Any) -> OuterJit | None:
    """Of a user's `functools.wraps` around a jitted function, such as a timer.

    It is traced as it is; arrays are placed by the jit in it.
    """
    makers = ("jax", "flax", "equinox")  # Theirs change arguments, `jax.vmap` say.
    is_function = isinstance(fn, types.FunctionType) and hasattr(fn, "__wrapped__")
    if not is_function or fn.__globals__.get("__name__", "").split(".")[0] in makers:
        return None
    inner = _jitted(fn.__wrapped__)
    if inner is None or inner.args:
        return None
    return OuterJit(
        fn,
        inner.static,
        inner.donated,
        static_scalars=inner.static_scalars,
        quiet=inner.quiet,
    )
