"""The only place for private JAX imports and for branches on the JAX version."""

import dataclasses
import inspect
from typing import Any

import jax

JAX_VERSION: tuple[int, ...] = jax.__version_info__

# Whether a Mosaic GPU kernel may change a `jax.Ref` that it is called with.
KERNELS_TAKE_REFS = JAX_VERSION >= (0, 11)


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of a whole reference into registers in `layout`."""
    # Not above: the library must import where no Pallas is.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load
    if JAX_VERSION < (0, 11):
        return load(ref, (), layout=layout)  # The index was an argument.
    return load(ref, layout=layout)


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr without its constants; JAX 0.12 has no other kind."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_jaxpr(x: Any) -> bool:
    """Whether `x` is a jaxpr, with its constants or without."""
    return hasattr(open_jaxpr(x), "eqns")


def jaxpr_consts(jaxpr: Any) -> tuple[Any, ...]:
    """The values of `open_jaxpr(jaxpr).constvars`, if the jaxpr holds them."""
    return tuple(getattr(jaxpr, "consts", ()))


def with_eqns(jaxpr: Any, eqns: list[Any]) -> Any:
    """`jaxpr` with other equations of the same variables; constants stay."""
    inner = open_jaxpr(jaxpr)
    if inner is jaxpr:
        return jaxpr.replace(eqns=eqns)
    return jaxpr.replace(jaxpr=inner.replace(eqns=eqns))


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # Since 0.12.
    return len(consts), len(carry)


@dataclasses.dataclass(frozen=True)
class JitOptions:
    """What `jax.jit`, or Equinox's `filter_jit`, was told about a function's arguments.

    Attributes:
        static_argnums, static_argnames, donate_argnums, donate_argnames: as in
            `jax.jit`.
        static_scalars: whether Python numbers are static, as in `filter_jit`.
    """

    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()
    static_scalars: bool = False


def jit_options(fn: Any) -> JitOptions:
    """The options of a jitted function; the defaults for any other callable."""
    if type(fn).__module__.startswith("equinox.") and hasattr(fn, "donate_first"):
        return _filter_jit_options(fn)
    info = getattr(fn, "_jit_info", None)
    if info is None:
        return JitOptions()
    return JitOptions(
        static_argnums=tuple(info.static_argnums),
        static_argnames=tuple(info.static_argnames),
        donate_argnums=tuple(info.donate_argnums),
        donate_argnames=tuple(info.donate_argnames),
    )


def _filter_jit_options(fn: Any) -> JitOptions:
    names = list(inspect.signature(fn).parameters)
    donated = [
        i for i in range(len(names)) if (fn.donate_rest if i else fn.donate_first)
    ]
    return JitOptions(
        donate_argnums=tuple(donated),
        donate_argnames=tuple(names[i] for i in donated),
        static_scalars=True,
    )
