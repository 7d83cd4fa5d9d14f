"""The body of the FP8 GEMM kernels: a warp-specialized pipeline for Hopper.

One memory warpgroup copies blocks of both operands and their scales into a ring of
stages in shared memory; two math warpgroups multiply them and promote every chunk of
128 of k into FP32 accumulators that live in registers. Stages are counted across output
blocks, so the memory warpgroup is already fetching the next block while the last one is
being stored: there is no bubble between blocks.

The GEMMs differ in the scales and in the schedule. Scales of rows are fetched with the
stage; those of tiles, of one operand at most, are one number for a warpgroup's part of
a block and a chunk, read from global memory. Groups are the schedule's: `_schedule.py`.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels.mosaic_gpu import _epilogue
from fp8jax.kernels.mosaic_gpu._common import called, kernel_name, launcher
from fp8jax.kernels.mosaic_gpu._config import SMEM_BYTES
from fp8jax.kernels.mosaic_gpu._fetch import fetch
from fp8jax.kernels.mosaic_gpu._multiply import multiply
from fp8jax.kernels.mosaic_gpu._pipeline import ring, split_warpgroups
from fp8jax.kernels.mosaic_gpu._schedule import Dense


def gemm_padded(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    tables: tuple[jax.Array, ...] = (),
    *,
    schedule: Dense,
    out_dtype: jax.typing.DTypeLike,
    num_sms: int,
    lhs_scale_rows: bool = True,
    rhs_scale_rows: bool,
    transposed: bool = False,
    accumulate: jax.Array | None = None,
) -> jax.Array:
    """Launches the kernel on operands that fit its copies.

    Args:
        lhs: FP8 [m, k], m a multiple of 8, k of 128; [g, m, k] of a batch.
        lhs_scale: float32 [k / 128, m], or [ceil(m / 128), k / 128] unless
            `lhs_scale_rows`. Of a batch [k / 128, g m] or [g, ceil(m / 128), k / 128].
        rhs: FP8 [n, k], n a multiple of 8; [g, n, k] of a batch and where rows are in
            groups. The side of the output that is contiguous, n or, where `transposed`,
            m, is a multiple of 32 and at least 64.
        rhs_scale: float32, [ceil(n / 128), k / 128], after g where rhs has it, or
            [k / 128, n] where `rhs_scale_rows`, [k / 128, g n] of a batch.
        tables: of the schedule.
        schedule: which blocks there are, and their shape.
        out_dtype: bfloat16 or float32.
        num_sms: multiprocessors to fill.
        lhs_scale_rows, rhs_scale_rows: whether every row of an operand has scales of
            its own. One of them has at least; without groups, either.
        transposed: whether to store the product as [n, m].
        accumulate: what to add the product to, of the result's shape and dtype
            float32; in place, where XLA need not keep it.

    Returns:
        [m, n], or [n, m], of `out_dtype`; after g of a batch, and where the contraction
        is in groups.
    """
    config = schedule.config
    assert config.smem_bytes(rhs_scale_rows=rhs_scale_rows) <= SMEM_BYTES, config
    assert len(tables) == schedule.tables

    cluster = {}
    if config.cluster > 1:
        cluster = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
    slots = _epilogue.slots(
        config,
        out_dtype,
        transposed=transposed,
        some_rows=schedule.stores_some_rows,
    )
    scratch = ring(
        config,
        lhs.dtype,
        lhs_scale_rows=lhs_scale_rows,
        rhs_scale_rows=rhs_scale_rows,
        results={"slots": slots},
    )
    m, n = lhs.shape[-2], rhs.shape[-2]
    shape = (*schedule.outputs, *((n, m) if transposed else (m, n)))
    adds = accumulate is not None
    store = functools.partial(
        _epilogue.store, config=config, transposed=transposed, add=adds
    )
    dims = "".join("1d" if rows else "2d" for rows in (lhs_scale_rows, rhs_scale_rows))
    launch = launcher(
        functools.partial(_body, schedule=schedule, store=store),
        kernel_name=kernel_name(schedule.op, dims, sides=(m, n, lhs.shape[-1])),
        out_type=() if adds else jax.ShapeDtypeStruct(shape, out_dtype),
        scratch_types=scratch,
        grid=(max(1, min(num_sms // config.cluster, schedule.most)),),
        grid_names=("grid",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **cluster,
    )
    operands = (lhs, lhs_scale, rhs, rhs_scale, *tables)
    if accumulate is None:
        return called(launch, *operands)
    out = jax.new_ref(accumulate)
    launch(*operands, out)
    return jax.freeze(out)


def _body(*refs, schedule: Dense, store, slots, **scratch) -> None:
    """Splits the warpgroups: those that multiply, and one that fetches."""
    lhs, lhs_scale, rhs, rhs_scale, *tables, out = refs
    tables, config = tuple(tables), schedule.config

    def math() -> None:
        leave = functools.partial(store, out=out, slots=slots)
        multiply(lhs_scale, (rhs_scale,), tables, schedule, config, leave, **scratch)

    def memory() -> None:
        fetch(lhs, lhs_scale, (rhs,), rhs_scale, tables, schedule, config, **scratch)

    split_warpgroups(config, math, memory)
