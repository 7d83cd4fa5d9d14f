"""What operands and results have to be: ValueErrors on behalf of the products."""

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.quant import QTensor

CONTRACTION_TILE = 128
_OUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_matrix(name: str, **operands: QTensor) -> None:
    """Each operand is a QTensor of two dimensions."""
    for argument, q in operands.items():
        check_qtensor(name, argument, q)
        if q.ndim != 2:
            raise ValueError(
                f"{name} takes matrices (vmap it over more), got "
                f"{argument}.shape={q.shape}."
            )


def check_qtensor(name: str, argument: str, q: QTensor) -> None:
    """An operand is a QTensor whose parts fit each other."""
    if not isinstance(q, QTensor):
        raise ValueError(f"{name} takes QTensors, got {argument}={type(q)}.")
    q.check(name)


def check_contraction(name: str, lhs: QTensor, rhs: QTensor) -> None:
    """Both operands have the same contraction last, in tiles of 128."""
    for argument, q in (("lhs", lhs), ("rhs", rhs)):
        if q.tile[1] != CONTRACTION_TILE:
            raise ValueError(
                f"{name} takes tiles of {CONTRACTION_TILE} along the contraction, "
                f"which is last, got {argument}.tile={q.tile}."
            )
    if lhs.shape[-1] != rhs.shape[-1]:
        raise ValueError(
            f"{name} contracts the last dimensions, [m, k] with [n, k], got "
            f"{lhs.shape} and {rhs.shape}."
        )


def check_out(
    name: str,
    out_dtype: jax.typing.DTypeLike,
    accumulate: jax.Array | None,
    out_shape: tuple[int, ...],
) -> None:
    """`out_dtype` is one that is rounded to, and `accumulate` fits the result."""
    if np.dtype(out_dtype) not in [np.dtype(d) for d in _OUT_DTYPES]:
        raise ValueError(
            f"{name} takes out_dtype bfloat16, float16 or float32, got {out_dtype}."
        )
    if accumulate is not None and (
        np.dtype(out_dtype) != np.float32
        or accumulate.dtype != np.float32
        or accumulate.shape != out_shape
    ):
        raise ValueError(
            f"{name} takes accumulate as the product's shape in float32, and "
            f"out_dtype float32 with it, got {accumulate.dtype}{accumulate.shape} for "
            f"{np.dtype(out_dtype)}{out_shape}."
        )
