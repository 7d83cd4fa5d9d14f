"""Options of jitted functions that a function calls: what would be lost of them."""

import contextlib
from collections.abc import Iterator

from fp8jax import _compat
from fp8jax.transform.call._outer_jit import OuterJit
from fp8jax.transform.call._parameters import name_of
from fp8jax.transform.ir import AnyJaxpr, called_name


@contextlib.contextmanager
def refusing_compiler_options(outer: OuterJit) -> Iterator[None]:
    """Says where compiler options go that JAX refuses of a jit within the program."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("`compiler_options` can only be passed to top"):
            raise
        name = name_of(outer.fn)
        raise ValueError(
            f"fp8_transform({name}) compiles one program, whose compiler options are "
            "those of its outermost jit: fp8_transform(jax.jit(fn, compiler_options="
            f"...)). JAX says: {error}"
        ) from error


def lost_donation(jaxpr: AnyJaxpr, outer: OuterJit) -> tuple[str, ...]:
    """What the function, called without the transform, would donate, in words.

    JAX donates no arguments of a jit within a program. Where the user jitted the whole,
    that was so before.

    Args:
        jaxpr: the program.
        outer: what jits the whole.
    """
    if outer.is_jitted or outer.donated:
        return ()
    inner = _compat.open_jaxpr(jaxpr)
    calls = [
        called_name(eqn)
        for eqn in inner.eqns
        if any(x is v for x in _compat.donated_operands(eqn) for v in inner.invars)
    ]
    return tuple(
        f"{name}, which it calls, donates nothing as a part of one program: pass "
        "donate_argnums= or donate_argnames= to fp8_transform."
        for name in dict.fromkeys(calls)
    )
