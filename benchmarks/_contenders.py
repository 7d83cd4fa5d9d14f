"""Who multiplies: this library's GEMM, and cuBLASLt's kernels by way of torch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _harness
from fp8jax.kernels import mosaic_gpu

# What a GEMM's name says of the tiles of its operands.
TILES = {
    "1d2d": ((1, 128), (128, 128)),  # fprop, dgrad
    "1d1d": ((1, 128), (1, 128)),  # wgrad
    "2d1d": ((128, 128), (1, 128)),  # wgrad with x in blocks
}


class Operands(NamedTuple):
    """Random operands of one GEMM, and its codes and scales as the kernels take them.

    Attributes:
        lhs, rhs: bfloat16 [m, k] and [n, k].
        lhs8, rhs8: their codes.
        lhs_scale: float32 [k / 128, m], or [m / 128, k / 128] of blocks.
        rhs_scale: [k / 128, n], or [n / 128, k / 128] of blocks.
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


@functools.partial(jax.jit, static_argnums=range(4))  # One compilation a shape.
def operands(kind: str, m: int, n: int, k: int, seed: int = 0) -> Operands:
    """Random operands; other numbers for another `seed`."""
    keys = jax.random.split(jax.random.key(m + n + k + seed), 4)
    uniform = functools.partial(jax.random.uniform, minval=0.5, maxval=1.5)
    lhs, rhs = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in ((keys[0], (m, k)), (keys[1], (n, k)))
    )
    scales = [
        uniform(key, (k // 128, rows) if tile[0] == 1 else (rows // 128, k // 128))
        for key, rows, tile in zip(keys[2:], (m, n), TILES[kind], strict=True)
    ]
    return Operands(
        lhs,
        rhs,
        lhs.astype(jnp.float8_e4m3fn),
        rhs.astype(jnp.float8_e4m3fn),
        *scales,
    )


def fp8_gemm(
    kind: str,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: mosaic_gpu.GemmConfig | None = None,
) -> Callable[..., jax.Array]:
    """Our jitted GEMM of `Operands.quantized`.

    Args:
        kind: of `TILES`.
        out_dtype: of the product; with a config bfloat16 or float32.
        config: the block shape, in the place of the one that is chosen.
    """
    lhs_tile, rhs_tile = TILES[kind]
    product: Callable[..., jax.Array] = mosaic_gpu.gemm
    if config is not None:
        product = functools.partial(mosaic_gpu.multiply, config=config)

    @jax.jit
    def run(lhs8, lhs_scale, rhs8, rhs_scale):
        # Scales lie as the kernels want them: these transposes cancel.
        return product(
            lhs8,
            lhs_scale.T if lhs_tile[0] == 1 else lhs_scale,
            rhs8,
            rhs_scale.T if rhs_tile[0] == 1 else rhs_scale,
            lhs_tile=lhs_tile,
            rhs_tile=rhs_tile,
            out_dtype=out_dtype,
        )

    return run


def torch_gemms(
    kind: str, x: Operands, names: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Those of `names` that torch has and that take these shapes, ready to launch.

    Args:
        kind: of `TILES`. cuBLASLt takes no blocks on the left: it gets them as rows.
        x: the operands.
        names: of "cublaslt_blockwise", "cublaslt_per_tensor_fast", "torch_bf16".
    """
    if not _harness.HAS_TORCH:
        return {}
    import torch  # pyright: ignore

    lhs_tile, rhs_tile = TILES[kind]
    if lhs_tile[0] > 1:
        x = x._replace(lhs_scale=jnp.repeat(x.lhs_scale.T, lhs_tile[0], axis=1))
    lhs, rhs, lhs8, rhs8, lhs_scale, rhs_scale = map(_harness.to_torch, x)
    one = torch.ones((), device="cuda")
    product = functools.partial(
        torch._scaled_mm, lhs8, rhs8.t(), out_dtype=torch.bfloat16
    )
    contenders = {
        "cublaslt_blockwise": functools.partial(
            product,
            scale_a=lhs_scale.t(),
            scale_b=rhs_scale if rhs_tile[0] == 1 else rhs_scale.t(),
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
