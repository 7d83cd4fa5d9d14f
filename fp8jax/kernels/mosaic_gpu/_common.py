"""What the Mosaic GPU kernels share: padding, batching rules and the device's size."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels import _bodies

_H100_SMS = 132
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Results = TypeVar("_Results")


def num_sms() -> int:
    """Multiprocessors of the GPU; those of an H100 where there is none to ask."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return _H100_SMS
    return getattr(device, "core_count", None) or _H100_SMS


def swizzled(columns: int, swizzle: int) -> tuple[Any, ...]:
    """The layout in shared memory that tensor copies and wgmma agree on.

    Args:
        columns: elements that `swizzle` bytes hold.
        swizzle: bytes of a row that stay together: 32, 64 or 128.
    """
    return (
        plgpu.TilingTransform((8, columns)),  # pyright: ignore
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore
    )


def kernel_name(op: str, *about: str, sides: tuple[int, ...]) -> str:
    """What profilers call a kernel: `fp8jax_gemm_1d2d_4096x7168x2048`.

    Args:
        op: the op's name.
        about: what else tells it from others, such as tiles.
        sides: of the problem, as given.
    """
    return "_".join(("fp8jax", op, *about, "x".join(map(str, sides))))


def launcher(body: Callable[..., None], *, out_type: Any, **options: Any) -> Any:
    """`plgpu.kernel`; where types alone are asked for, the body is not traced."""
    if _bodies.are_left_out():
        return lambda *operands: jax.tree.map(
            lambda x: lax.full(x.shape, 0, x.dtype), out_type
        )
    return plgpu.kernel(body, out_type=out_type, **options)


def await_stores() -> None:
    """Ends a kernel: its copies to global memory have read what they copy.

    Shared memory must outlive that. That they are written, too, before the next kernel
    begins, is the device's part.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def called(kernel: Callable[..., _Results], *operands: jax.Array) -> _Results:
    """A kernel's results as JAX and XLA must take them.

    In a `shard_map` that checks types they vary as the operands do, which Pallas does
    not say. And they are of one call: where a result is stacked by a scan and read on,
    too, XLA copies the call into a fusion that writes the stack and keeps the call for
    the other readers: the kernel would run twice. A barrier keeps the readers apart
    from the call. Put it right on what the kernel writes, inside any transpose or cast,
    which XLA then still cancels.
    """
    axes = _compat.union_of_varying_axes(*operands)
    results = jax.tree.map(lambda x: _compat.varying_over(x, axes), kernel(*operands))
    return lax.optimization_barrier(results)


def in_float32(function: Callable[..., _Results]) -> Callable[..., _Results]:
    """`function` of its operands as float32."""
    return lambda *operands: function(*(x.astype(jnp.float32) for x in operands))


def in_32_bits(kernel: _Function) -> _Function:
    """`kernel`, traced with 32-bit integers where the user has enabled 64-bit ones.

    Block indices are int32 on the device; a Python integer must not become an int64.
    """

    @functools.wraps(kernel)
    def run(*args: Any, **options: Any) -> Any:
        if not jax.config.read("jax_enable_x64"):
            return kernel(*args, **options)
        with jax.enable_x64(False):
            return kernel(*args, **options)

    return cast(_Function, run)


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def zero_pad(x: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
    """Appends zeros until every side is a multiple of its entry; often no-op."""
    widths = [
        (0, -side % multiple) for side, multiple in zip(x.shape, multiples, strict=True)
    ]
    return jnp.pad(x, widths) if any(w for _, w in widths) else x


def mapped_under_vmap(
    kernel: Callable[..., Any],
    fold: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`kernel` with a batching rule: under vmap it runs once for each batch entry.

    Args:
        kernel: arrays to a pytree of arrays.
        fold: `fold(x)` runs one argument's whole batch `x [b, ...]` in one launch, or
            returns None where the numbers would change; tried before the loop.
    """

    call = jax.custom_batching.custom_vmap(kernel)

    @call.def_vmap
    def _batched(axis_size: int, in_batched: list[bool], *args: jax.Array) -> Any:
        del axis_size
        out = fold(*args) if fold is not None and all(in_batched) else None
        if out is None:

            def one(batched: tuple[jax.Array, ...]) -> Any:
                entries = iter(batched)
                return call(
                    *(
                        next(entries) if b else arg
                        for b, arg in zip(in_batched, args, strict=True)
                    )
                )

            batched = tuple(a for a, b in zip(args, in_batched, strict=True) if b)
            out = lax.map(one, batched)
        return out, jax.tree.map(lambda _: True, out)

    return call
