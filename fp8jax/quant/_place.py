"""Where codes and scales lie in memory, which a QTensor's shape does not tell."""

import functools

import jax
from jax.core import Tracer
from jax.experimental.layout import Format, Layout

from fp8jax.quant._qtensor import QTensor


def contraction_minor(kernel: QTensor) -> QTensor:
    """The same QTensor `[..., k, n]`, in memory as `[..., n, k]`: codes and scales.

    8-bit matrix units read both operands with the contraction last. An array that lies
    so is what a product of `kernel.T` reads as it is; in JAX's own order each product
    on a GPU would transpose it first, which takes longer than to decode a few tokens.
    `jax.jit` keeps the order of the arrays that it is given, and sharding too.

    Args:
        kernel: of arrays on devices. What is traced passes as it is: a program's
            results lie in JAX's own order, unless its caller says otherwise.

    Raises:
        ValueError: If the kernel is no valid QTensor.
    """
    kernel.check("contraction_minor")
    if isinstance(kernel.data, Tracer):
        return kernel
    sides = range(kernel.ndim)
    layout = Layout((*sides[:-2], sides[-1], sides[-2]))
    return jax.tree.map(lambda x: _laid_out(Format(layout, x.sharding))(x), kernel)


@functools.lru_cache(maxsize=256)
def _laid_out(where: Format):
    def contraction_minor(x: jax.Array) -> jax.Array:
        return x

    return jax.jit(contraction_minor, out_shardings=where)
