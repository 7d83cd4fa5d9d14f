"""Lowers each GPU kernel once per process, and compiles it while JAX goes on.

By itself, JAX lowers a GPU kernel anew in every program and in each answer to XLA's
partitioner, in Python, a third of a second per kernel. Mosaic takes as long again to
compile one, one kernel at a time, once XLA emits the program. Here each kernel is an
equation of its own. Its lowering is an exported function, made once; a thread compiles
it, so that Mosaic, which keeps what it compiled, has it ready when XLA asks.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
from jax import export
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fp8jax import _compat
from fp8jax.kernels import _bodies

# Pallas promises no stability of its calls between versions; these live in one process.
_CHECKS = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]

_Kernel = Callable[..., Any]
_Static = tuple[tuple[str, Any], ...]
_Shapes = tuple[jax.ShapeDtypeStruct, ...]


def called(kernel: _Kernel, *arrays: jax.Array, **static: Any) -> Any:
    """`kernel(*arrays, **static)`, lowered once.

    In a mesh's context it is the kernel itself, whose types say what arrays vary over,
    and in Pallas' interpret mode.

    Args:
        kernel: the same function object for the same kernel; not differentiated.
        arrays: its operands.
        static: hashable.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names or _compat.interprets_kernels():
        _compat.ask_ptxas_once()
        return kernel(*arrays, **static)
    options = tuple(sorted(static.items()))
    flat = _KERNEL.bind(*arrays, kernel=kernel, static=options)
    return jax.tree.unflatten(jax.tree.structure(_types(arrays, kernel, options)), flat)


def _key(arrays: Sequence[Any], kernel: _Kernel, static: _Static) -> tuple[Any, ...]:
    """What a trace depends on, with whether integers have 64 bits."""
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    return kernel, static, shapes, jax.config.read("jax_enable_x64")


def _types(arrays: Sequence[Any], kernel: _Kernel, static: _Static) -> Any:
    """The kernel's results, as `jax.ShapeDtypeStruct`s."""
    return _types_of(*_key(arrays, kernel, static))


@functools.lru_cache(maxsize=1024)
def _types_of(kernel: _Kernel, static: _Static, shapes: _Shapes, x64: bool) -> Any:
    del x64  # A part of the key alone.
    with _bodies.left_out():
        return jax.eval_shape(functools.partial(kernel, **dict(static)), *shapes)


@functools.lru_cache(maxsize=1024)
def _jitted(kernel: _Kernel, static: _Static) -> Any:
    _compat.ask_ptxas_once()
    return jax.jit(functools.partial(kernel, **dict(static)))


@functools.lru_cache(maxsize=1024)
def _exported(
    kernel: _Kernel, static: _Static, shapes: _Shapes, x64: bool
) -> export.Exported:
    del x64  # A part of the key alone.
    run = _jitted(kernel, static)
    made = export.export(run, platforms=["cuda"], disabled_checks=_CHECKS)(*shapes)
    _compile_ahead(made)
    return made


def _compile_ahead(made: export.Exported) -> None:
    if jax.default_backend() == "gpu":
        _thread().submit(_compile, made)


@functools.cache
def _thread() -> futures.ThreadPoolExecutor:
    # One thread: Mosaic compiles one kernel at a time.
    return futures.ThreadPoolExecutor(1, thread_name_prefix="fp8jax_compile")


def _compile(made: export.Exported) -> None:
    """Leaves the kernel with Mosaic, which knows it again in every other program."""
    # What fails here fails in the program, too, with an error that the user sees.
    with contextlib.suppress(Exception):
        jax.jit(made.call).lower(*made.in_avals).compile()


def _call(*arrays: jax.Array, kernel: _Kernel, static: _Static) -> list[jax.Array]:
    return jax.tree.leaves(_jitted(kernel, static)(*arrays))


def _call_exported(
    *arrays: jax.Array, kernel: _Kernel, static: _Static
) -> list[jax.Array]:
    made = _exported(*_key(arrays, kernel, static))
    return jax.tree.leaves(made.call(*arrays))


def _abstract(*types: Any, kernel: _Kernel, static: _Static) -> list[Any]:
    # Types of the context: a mesh, where there is one, has no axis.
    return [
        types[0].update(shape=x.shape, dtype=x.dtype, weak_type=False)
        for x in jax.tree.leaves(_types(types, kernel, static))
    ]


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A kernel under `jax.vmap`: it has rules of its own, as one launch for a batch.

    Attributes:
        kernel: the kernel.
        dims: for each operand, the dimension that is mapped, or None.
    """

    kernel: _Kernel
    dims: tuple[int | None, ...]

    def __call__(self, *arrays: jax.Array, **static: Any) -> Any:
        run = functools.partial(self.kernel, **static)
        return jax.vmap(run, self.dims)(*arrays)


def _batched(
    arrays: Any, dims: Any, *, kernel: _Kernel, static: _Static
) -> tuple[list[jax.Array], list[int]]:
    mapped = _Mapped(kernel, tuple(dims))
    out = jax.tree.leaves(called(mapped, *arrays, **dict(static)))
    return out, [0] * len(out)


def _lowered_anew(ctx: Any, *values: Any, **params: Any) -> Any:
    call = functools.partial(_call, **params)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *values)


def _lowered(ctx: Any, *values: Any, **params: Any) -> Any:
    if len(ctx.module_context.platforms) > 1:  # What is exported is for CUDA alone.
        return _lowered_anew(ctx, *values, **params)
    call = functools.partial(_call_exported, **params)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *values)


_KERNEL = Primitive("fp8jax_kernel")
_KERNEL.multiple_results = True
_KERNEL.def_impl(_call)
_KERNEL.def_abstract_eval(_abstract)
batching.primitive_batchers[_KERNEL] = _batched
mlir.register_lowering(_KERNEL, _lowered_anew)
mlir.register_lowering(_KERNEL, _lowered, platform="cuda")
