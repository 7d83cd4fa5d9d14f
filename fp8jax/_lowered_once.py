"""GPU kernels that are lowered once a process, and compiled while JAX goes on.

JAX lowers a GPU kernel anew in every program, and in each answer to XLA's partitioner:
in Python, a third of a second each. Mosaic compiles as long again, one kernel after
another, when XLA emits the program at last. So a kernel is an equation of its own here.
Its lowering is an exported function, made once; and what was exported is compiled in a
thread, so that Mosaic, which keeps what it compiled, is done when XLA asks.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
from jax import export
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fp8jax import _compat

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
        return kernel(*arrays, **static)
    options = tuple(sorted(static.items()))
    flat = _KERNEL.bind(*arrays, kernel=kernel, static=options)
    return jax.tree.unflatten(_traced(kernel, options, _shapes(arrays))[1], flat)


def _shapes(arrays: Sequence[Any]) -> _Shapes:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def _traced(kernel: _Kernel, static: _Static, shapes: _Shapes) -> Any:
    return _traced_once(kernel, static, shapes, jax.config.read("jax_enable_x64"))


@functools.lru_cache(maxsize=1024)
def _traced_once(kernel: _Kernel, static: _Static, shapes: _Shapes, x64: bool) -> Any:
    """A jitted function to a list, and the structure and the types of its results."""
    del x64  # A part of the key alone: what is traced depends on it.

    def run(*arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(kernel(*arrays, **dict(static)))

    out = jax.eval_shape(lambda *arrays: kernel(*arrays, **dict(static)), *shapes)
    return jax.jit(run), jax.tree.structure(out), jax.tree.leaves(out)


@functools.lru_cache(maxsize=1024)
def _exported(
    kernel: _Kernel, static: _Static, shapes: _Shapes, x64: bool
) -> export.Exported:
    run = _traced_once(kernel, static, shapes, x64)[0]
    made = export.export(run, platforms=["cuda"], disabled_checks=_CHECKS)(*shapes)
    _compile_ahead(made)
    return made


def _compile_ahead(made: export.Exported) -> None:
    if jax.default_backend() == "gpu":
        _thread().submit(_compile, made)


@functools.cache
def _thread() -> futures.ThreadPoolExecutor:
    # One: Mosaic compiles no two kernels at a time.
    return futures.ThreadPoolExecutor(1, thread_name_prefix="fp8jax_compile")


def _compile(made: export.Exported) -> None:
    """Leaves the kernel with Mosaic, which knows it again in every other program."""
    # What fails here fails in the program, too, with an error that the user sees.
    with contextlib.suppress(Exception):
        jax.jit(made.call).lower(*made.in_avals).compile()


def _call(*arrays: jax.Array, kernel: _Kernel, static: _Static) -> Any:
    return _traced(kernel, static, _shapes(arrays))[0](*arrays)


def _call_exported(*arrays: jax.Array, kernel: _Kernel, static: _Static) -> Any:
    x64 = jax.config.read("jax_enable_x64")
    return _exported(kernel, static, _shapes(arrays), x64).call(*arrays)


def _abstract(*types: Any, kernel: _Kernel, static: _Static) -> Any:
    results = _traced(kernel, static, _shapes(types))[2]
    # Types of the context: a mesh, where there is one, has no axis.
    return [
        types[0].update(shape=x.shape, dtype=x.dtype, weak_type=False) for x in results
    ]


def _batched(
    arrays: Any, dims: Any, *, kernel: _Kernel, static: _Static
) -> tuple[Any, Any]:
    def run(*arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(kernel(*arrays, **dict(static)))

    # Kernels have rules of their own, such as one launch for a whole batch.
    out = jax.vmap(run, dims)(*arrays)
    return out, [0] * len(out)


def _lowered(ctx: Any, *values: Any, **params: Any) -> Any:
    # What is exported is for one platform.
    is_alone = len(ctx.module_context.platforms) == 1
    call = functools.partial(_call_exported if is_alone else _call, **params)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *values)


_KERNEL = Primitive("fp8jax_kernel")
_KERNEL.multiple_results = True
_KERNEL.def_impl(_call)
_KERNEL.def_abstract_eval(_abstract)
batching.primitive_batchers[_KERNEL] = _batched
mlir.register_lowering(
    _KERNEL,
    lambda ctx, *values, **params: mlir.lower_fun(
        functools.partial(_call, **params), multiple_results=True
    )(ctx, *values),
)
mlir.register_lowering(_KERNEL, _lowered, platform="cuda")
