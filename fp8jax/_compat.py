"""The only place for private JAX imports and for branches on the JAX version."""

import dataclasses
from typing import Any

import jax

JAX_VERSION: tuple[int, ...] = jax.__version_info__


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
    """What `jax.jit` was told about a function's arguments."""

    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()


def jit_options(fn: Any) -> JitOptions:
    """The options of a `jax.jit` object; the defaults for any other callable."""
    info = getattr(fn, "_jit_info", None)
    if info is None:
        return JitOptions()
    names = [field.name for field in dataclasses.fields(JitOptions)]
    return JitOptions(**{name: tuple(getattr(info, name)) for name in names})
