"""How a transformed step is jitted: as the function was that it is made of."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from fp8jax.transform.call._outer_jit import OuterJit


def jit_step(run: Callable[..., Any], outer: OuterJit, measures: bool) -> Any:
    """`run(key, *args, **kwargs)`, jitted, `key` and the static arguments being static.

    Args:
        run: gives `outer.fn`'s results, or a pair of those and statistics.
        outer: how `outer.fn` is to be jitted.
        measures: whether `run` gives statistics, too.
    """
    static, donated = outer.static.after(1), outer.donated.after(1)
    signature = _after_key(outer.fn)
    if signature is not None:  # For the names of arguments in messages.
        run.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    results = outer.out_shardings
    with warnings.catch_warnings():
        if "device" in outer.others or "backend" in outer.others:
            # That they are deprecated was said when the function was jitted.
            warnings.simplefilter("ignore", DeprecationWarning)
        return outer.jit(
            run,
            static_argnums=(0, *sorted(static.numbers)),
            static_argnames=tuple(sorted(static.names)),
            donate_argnums=tuple(sorted(donated.numbers)),
            donate_argnames=tuple(sorted(donated.names)),
            in_shardings=_of_dynamic_arguments(outer),
            out_shardings=(results, None) if measures and results else results,
            **outer.others,
        )


def _of_dynamic_arguments(outer: OuterJit) -> Any:
    shardings = outer.in_shardings
    if not isinstance(shardings, tuple):
        return shardings
    return tuple(s for i, s in enumerate(shardings) if i not in outer.static.numbers)


def _after_key(fn: Callable[..., Any]) -> inspect.Signature | None:
    key = inspect.Parameter("_key", inspect.Parameter.POSITIONAL_ONLY)
    try:
        signature = inspect.signature(fn)
        return signature.replace(parameters=[key, *signature.parameters.values()])
    except (TypeError, ValueError):
        return None
