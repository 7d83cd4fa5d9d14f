"""What the GEMM kernels can run: shared memory and registers of a config."""

from fp8jax.kernels.mosaic_gpu._config import (
    COPIED_SCALES,
    SMEM_BYTES,
    GemmConfig,
)
from fp8jax.kernels.mosaic_gpu._problem import GemmKind

_WGMMA_ROWS, _STORED_COLUMNS = 64, 16
_THREADS = 128  # Of a warpgroup.
# Of the 232 that a thread has; more accumulators than this spill.
_ACCUMULATOR_REGISTERS = 192


def smem_bytes(kind: GemmKind, config: GemmConfig) -> int:
    """Bytes of shared memory that a CTA of this config needs."""
    return config.smem_bytes(rhs_scale_rows=kind == "1d1d")


def accumulator_registers(config: GemmConfig) -> int:
    """Registers of a thread that hold sums: the products in flight, and the total."""
    return config.wg_m * config.wg_n // _THREADS * (config.accumulators + 1)


def refusal(kind: GemmKind, config: GemmConfig) -> str | None:
    """Why the kernel cannot run `config`, or None."""
    counts = (config.chunks, config.accumulators, config.stages, config.cluster)
    if min(*counts, config.wg_m, config.wg_n) < 1:
        return f"has a size below 1: {config}"
    if config.chunks % config.accumulators:
        return f"has {config.chunks=}, no multiple of {config.accumulators=}"
    if (needed := smem_bytes(kind, config)) > SMEM_BYTES:
        return f"needs {needed} bytes of shared memory, a CTA has {SMEM_BYTES}"
    if config.wg_m % _WGMMA_ROWS or config.wg_n % _STORED_COLUMNS:
        return (
            f"gives a warpgroup {config.wg_m}x{config.wg_n}, no multiple of "
            f"{_WGMMA_ROWS}x{_STORED_COLUMNS}"
        )
    if (scales := config.covers[0] * config.chunks) % COPIED_SCALES:
        return f"fetches {scales} scales a stage, no multiple of {COPIED_SCALES}"
    if (registers := accumulator_registers(config)) > _ACCUMULATOR_REGISTERS:
        return (
            f"needs {registers} registers a thread for sums, of at most "
            f"{_ACCUMULATOR_REGISTERS}"
        )
    return None
