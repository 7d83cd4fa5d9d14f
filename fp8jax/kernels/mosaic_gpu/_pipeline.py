"""The ring of stages that the GEMMs fetch into, and which warpgroups do what."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels.mosaic_gpu._common import swizzled
from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig

# Bytes of an 8-bit row that the swizzled layout of wgmma keeps together.
OPERAND = swizzled(CHUNK, CHUNK)

_MEMORY_REGISTERS = 40
_MATH_REGISTERS = 232  # (64K registers / 128 threads - 40) / 2, a multiple of 8.


def ring(
    config: GemmConfig,
    dtype: jax.typing.DTypeLike,
    *,
    rhs_parts: int = 1,
    lhs_scale_rows: bool = True,
    rhs_scale_rows: bool = False,
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """Shared memory and barriers of the stages, by the names that `fetch` takes.

    Args:
        config: the block shape.
        dtype: of the operands.
        rhs_parts: matrices that share a block of the rhs, each with a copy of its own.
        lhs_scale_rows, rhs_scale_rows: whether scales are fetched with an operand.
        results: shared memory, by name, for what leaves.
    """
    empty: Any = plgpu.Barrier
    if config.cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    k, scales = config.chunks * CHUNK, (config.stages, config.chunks)

    def operand(rows: int) -> Any:
        return plgpu.SMEM((config.stages, rows, k), dtype, transforms=OPERAND)

    def scale(rows: int) -> Any:
        return plgpu.SMEM((*scales, rows), jnp.float32)

    return {
        "lhs_smem": operand(config.block_m),
        "rhs_smem": operand(config.block_n),
        "lhs_scale_smem": scale(config.block_m) if lhs_scale_rows else None,
        "rhs_scale_smem": scale(config.block_n) if rhs_scale_rows else None,
        **results,
        # The operands, and what there is of their scales.
        "full": plgpu.Barrier(
            num_arrivals=1 + rhs_parts + lhs_scale_rows + rhs_scale_rows,
            num_barriers=config.stages,
        ),
        "empty": empty(num_arrivals=config.warpgroups, num_barriers=config.stages),
    }


def split_warpgroups(
    config: GemmConfig, math: Callable[[], None], memory: Callable[[], None]
) -> None:
    """The last warpgroup fetches; two multiply with most of the registers, or one."""

    def multiply() -> None:
        # One has registers enough: half of them.
        if config.warpgroups > 1:
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
        math()

    def fetch() -> None:
        if config.warpgroups > 1:
            plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        memory()

    lax.cond(lax.axis_index("wg") < config.warpgroups, multiply, fetch)
