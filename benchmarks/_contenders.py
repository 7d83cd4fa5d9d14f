"""Who multiplies: this library's GEMM, and cuBLASLt's kernels by way of torch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _harness
from fp8jax.kernels import mosaic_gpu


class Operands(NamedTuple):
    """Random operands of one GEMM, and its codes and scales as the kernels take them.

    Attributes:
        lhs, rhs: bfloat16 [m, k] and [n, k].
        lhs8, rhs8: their codes.
        lhs_scale: float32 [k / 128, m].
        rhs_scale: [n / 128, k / 128] for 1d2d, [k / 128, n] for 1d1d.
    """

    lhs: jax.Array
    rhs: jax.Array
    lhs8: jax.Array
    rhs8: jax.Array
    lhs_scale: jax.Array
    rhs_scale: jax.Array

    @property
    def quantized(self) -> tuple[jax.Array, ...]:
        """What `fp8_gemm` takes."""
        return self.lhs8, self.lhs_scale, self.rhs8, self.rhs_scale


def operands(kind: str, m: int, n: int, k: int, *, seed: int = 0) -> Operands:
    keys = jax.random.split(jax.random.key(m + n + k + seed), 4)
    uniform = functools.partial(jax.random.uniform, minval=0.5, maxval=1.5)
    lhs, rhs = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in ((keys[0], (m, k)), (keys[1], (n, k)))
    )
    rhs_shape = (k // 128, n) if kind == "1d1d" else (n // 128, k // 128)
    return Operands(
        lhs,
        rhs,
        lhs.astype(jnp.float8_e4m3fn),
        rhs.astype(jnp.float8_e4m3fn),
        uniform(keys[2], (k // 128, m)),
        uniform(keys[3], rhs_shape),
    )


def fp8_gemm(kind: str) -> Callable[..., jax.Array]:
    """Our jitted GEMM of `Operands.quantized`, bfloat16 out."""
    rows = kind == "1d1d"

    @jax.jit
    def run(lhs8, lhs_scale, rhs8, rhs_scale):
        # Scales lie as the kernels want them: these transposes cancel.
        return mosaic_gpu.gemm(
            lhs8,
            lhs_scale.T,
            rhs8,
            rhs_scale.T if rows else rhs_scale,
            lhs_tile=(1, 128),
            rhs_tile=(1 if rows else 128, 128),
            out_dtype=jnp.bfloat16,
        )

    return run


def torch_gemms(
    kind: str, x: Operands, names: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Those of `names` that torch has and that take these shapes, ready to launch.

    Args:
        kind: "1d2d" or "1d1d".
        x: the operands.
        names: of "cublaslt_blockwise", "cublaslt_per_tensor_fast", "torch_bf16".
    """
    if not _harness.HAS_TORCH:
        return {}
    import torch  # pyright: ignore

    lhs, rhs, lhs8, rhs8, lhs_scale, rhs_scale = map(_harness.to_torch, x)
    one = torch.ones((), device="cuda")
    product = functools.partial(
        torch._scaled_mm, lhs8, rhs8.t(), out_dtype=torch.bfloat16
    )
    contenders = {
        "cublaslt_blockwise": functools.partial(
            product,
            scale_a=lhs_scale.t(),
            scale_b=rhs_scale if kind == "1d1d" else rhs_scale.t(),
        ),
        "cublaslt_per_tensor_fast": functools.partial(
            product, scale_a=one, scale_b=one, use_fast_accum=True
        ),
        "torch_bf16": functools.partial(torch.mm, lhs, rhs.t()),
    }
    working = {}
    for name in names:
        try:
            contenders[name]()
        except (RuntimeError, ValueError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
        else:
            working[name] = contenders[name]
    return working
