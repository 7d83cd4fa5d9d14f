"""Which lowering runs: a table, the checks of what this machine has, and refusals.

An op is asked for by name. Without an explicit `implementation` the first one in the
table that is available and does not refuse runs; with one, that one runs or the call
raises. Every call is made by `marked`, so that `fp8jax.fp8_transform` knows this
library's own work when it meets it. None of it is differentiated: it is about codes.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from fp8jax import _lowered_once, numerics
from fp8jax.kernels import check_available

# Before the names of our own jitted functions: nothing that is written with `def` has
# such a name, and derivatives, `vmap`, remat and dead-code elimination keep it.
MARK = "fp8jax::"
_NAMES: set[str] = set()  # Those that are taken; a name set by hand is none.

# In order of preference.
_TABLE: dict[str, tuple[str, ...]] = {
    "quantize": ("mosaic_gpu", "xla"),
    "quantize_add_rms_norm": ("mosaic_gpu", "xla"),
    "quantize_both": ("mosaic_gpu", "xla"),
    "quantize_map": ("mosaic_gpu", "xla"),
    "quantize_rms_norm": ("mosaic_gpu", "xla"),
    "quantize_swiglu": ("mosaic_gpu", "xla"),
    "quantize_swiglu_gradient": ("mosaic_gpu", "xla"),
    "quantize_grouped": ("mosaic_gpu", "xla"),
    "gemm": ("mosaic_gpu", "xla"),
    "gemm_swiglu": ("mosaic_gpu", "xla"),
    "grouped_gemm": ("mosaic_gpu", "xla"),
    "grouped_gemm_k": ("mosaic_gpu", "xla"),
}


def marked(name: str, function: Callable[..., Any], **options: Any) -> Any:
    """`function`, jitted under a name that `mark_of` knows.

    Args:
        name: that `mark_of` gives.
        function: of arrays, and of what `options` say is static.
        options: of `jax.jit`.
    """

    def run(*arrays: jax.Array, **static: Any) -> Any:
        return function(*arrays, **static)

    _NAMES.add(name)
    run.__name__ = run.__qualname__ = f"{MARK}{name}"
    return jax.jit(run, **options)


def mark_of(eqn: Any) -> str | None:
    """The name that `marked` was given for the function an equation calls, if any."""
    name = str(eqn.params.get("name", ""))
    if not name.startswith(MARK) or name.removeprefix(MARK) not in _NAMES:
        return None
    return name.removeprefix(MARK)


def undifferentiated(name: str, tree: Any) -> Any:
    """A pytree of arrays; TypeError, on behalf of `name`, if one is differentiated."""
    constant = _constant(name)
    # Arrays that are no tracers are constants, and need no equation that says so.
    return jax.tree.map(lambda x: constant(x) if isinstance(x, Tracer) else x, tree)


@functools.cache
def _constant(name: str) -> Callable[[jax.Array], jax.Array]:
    refuse = numerics.refuse_derivatives(_same, numerics.no_derivative(name))
    return marked("constant", lambda x: refuse(x)[0])


def _same(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


def call(
    op: str,
    *arrays: jax.Array,
    implementation: str | None,
    caller: str | None = None,
    **static: Any,
) -> Any:
    """Runs `op` on `arrays` with the first implementation that takes them.

    Args:
        op, arrays, static: of the kernel.
        implementation: which one; None for the first.
        caller: who is said to have no derivative; `op` by default.

    Raises:
        TypeError: When differentiated.
        ValueError: If `implementation` is no name in the table.
        NotImplementedError: If the implementation asked for, or every one, is
            unavailable here or refuses these arguments; it gives each one's reason.
    """
    run = functools.partial(_run, op, arrays, static, caller or op)
    return _first_that_takes(op, implementation, run)[1]


def resolve(
    op: str, *arrays: jax.ShapeDtypeStruct, implementation: str | None, **static: Any
) -> str:
    """The name of the implementation that `call` would run; raises as it does."""

    def run(name: str) -> Any:
        return jax.eval_shape(lambda *x: _run(op, x, static, op, name), *arrays)

    return _first_that_takes(op, implementation, run)[0]


def _run(op: str, arrays: tuple, static: dict[str, Any], caller: str, name: str) -> Any:
    if name != "xla" and numerics.is_symbolic(*arrays):
        raise NotImplementedError(
            "a GPU's kernel is made for one shape, got symbolic dimensions: "
            f"{', '.join(str(list(x.shape)) for x in arrays)}."
        )
    options = tuple(sorted(static.items()))
    return _marked(op, name)(*arrays, static=options, caller=caller)


def _first_that_takes(
    op: str, implementation: str | None, run: Callable[[str], Any]
) -> tuple[str, Any]:
    if implementation is not None and implementation not in _TABLE[op]:
        raise ValueError(
            f"{op}: implementation={implementation!r} is not known; allowed are None "
            f"(choose) and {', '.join(map(repr, _TABLE[op]))}."
        )
    refusals = []
    for name in _TABLE[op] if implementation is None else (implementation,):
        try:
            check_available(name)
            return name, run(name)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    asked = "" if implementation is None else f" as asked, {implementation!r}"
    raise NotImplementedError(f"{op} cannot run{asked}. " + " ".join(refusals))


@functools.cache
def _marked(op: str, name: str) -> Callable[..., Any]:
    # Imported on first use: Pallas takes long to import, and CPU users need none of it.
    kernel = getattr(importlib.import_module(f"fp8jax.kernels.{name}"), op)

    def run(
        *arrays: jax.Array, static: tuple[tuple[str, Any], ...], caller: str
    ) -> Any:
        # Inside of the mark, and traced once for all calls. Not around the kernel: one
        # that changes a `jax.Ref` may not be called by a function with a rule.
        refuse = numerics.refuse_derivatives(_same, numerics.no_derivative(caller))
        if name == "xla":
            return kernel(*refuse(*arrays), **dict(static))
        return _lowered_once.called(kernel, *refuse(*arrays), **dict(static))

    return marked(f"{op}_{name}", run, static_argnames=("static", "caller"))
