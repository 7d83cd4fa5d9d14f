"""Whether the GEMM can be relied on: same bits always, nothing leaks, nothing is lost.

On a GPU, but for the lowering tests and the ones of the checks themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

import fp8jax
from fp8jax.kernels import mosaic_gpu, xla
from fp8jax.kernels.mosaic_gpu._common import swizzled
from fp8jax.testing import (
    assert_same_bits,
    every_gemm_config,
    gemm_float64,
    positive_uniform,
)
from tests.kernels.trust import assert_repeats, run_on_poisoned_output

# Of lhs and rhs. The kernel makes a 2d1d product as 1d2d, transposed.
TILES = {
    "1d2d": ((1, 128), (128, 128)),
    "1d1d": ((1, 128), (1, 128)),
    "2d1d": ((128, 128), (1, 128)),
}
CONFIGS_OF = {"1d2d": "1d2d", "1d1d": "1d1d", "2d1d": "1d2d"}
each_kind = pytest.mark.parametrize("kind", TILES)
each_out_dtype = pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])


def operands(kind, m, n, k, draw=None):
    """Codes and scales of normal numbers, or of what `draw(rng, shape)` gives."""
    rng = np.random.default_rng(m + n + k)
    draw = draw or (lambda rng, shape: rng.standard_normal(shape, np.float32))
    return tuple(
        array
        for rows, tile in zip((m, n), TILES[kind], strict=True)
        for array in quantize(jnp.asarray(draw(rng, (rows, k))), tile)
    )


@functools.partial(jax.jit, static_argnums=1)
def quantize(x, tile):
    return xla.quantize(x, tile=tile, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0)


def tiles(kind):
    return dict(zip(("lhs_tile", "rhs_tile"), TILES[kind], strict=True))


@functools.cache  # One function, compiled once for all that has its shape.
def gemm(kind, out_dtype="bfloat16"):
    def run(*args):
        return mosaic_gpu.gemm(*args, **tiles(kind), out_dtype=out_dtype)

    return run


# Same bits.


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("m", [1, 64, 128, 2048])
def test_twenty_runs_give_the_same_bits(kind, m):
    args = operands(kind, m, 2304, 1536)
    run = jax.jit(gemm(kind))
    assert_repeats(run, *args)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("m", [1, 64, 200])
def test_same_bits_eager_jitted_mapped_and_scanned(kind, m):
    lhs, lhs_scale, rhs, rhs_scale = operands(kind, m, 320, 1000)
    run = gemm(kind)
    eager = np.asarray(run(lhs, lhs_scale, rhs, rhs_scale))
    batch = tuple(jnp.asarray(np.stack([x] * 3)) for x in (lhs, lhs_scale))

    def step(carry, x):
        return carry, run(*x, rhs, rhs_scale)

    mapped = jax.vmap(run, (0, 0, None, None))(*batch, rhs, rhs_scale)
    _, scanned = jax.jit(lambda xs: lax.scan(step, jnp.float32(0), xs))(batch)
    jitted = np.asarray(jax.jit(run)(lhs, lhs_scale, rhs, rhs_scale))
    assert_same_bits(jitted, eager)
    assert_same_bits(np.asarray(mapped), np.stack([eager] * 3))
    assert_same_bits(np.asarray(scanned), np.stack([eager] * 3))


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize(("n", "k"), [(2304, 640), (34048, 256), (320, 16384)])
def test_row_does_not_depend_on_m(kind, n, k):
    # Over every size at which the config changes: other blocks, clusters, splits.
    lhs, lhs_scale, rhs, rhs_scale = operands(kind, 4096, n, k)
    run = jax.jit(gemm(kind, "float32"))
    whole = np.asarray(run(lhs, lhs_scale, rhs, rhs_scale))
    lhs, lhs_scale = map(np.asarray, (lhs, lhs_scale))  # JAX compiles every slice.
    for m in (1, 8, 16, 17, 32, 63, 64, 65, 127, 128, 129, 256, 257, 512, 1000):
        scale_rows = -(-m // TILES[kind][0][0])
        part = run(lhs[:m], lhs_scale[:scale_rows], rhs, rhs_scale)
        assert (np.asarray(part) == whole[:m]).all(), m


@pytest.mark.gpu
@each_kind
def test_every_config_gives_the_same_bits(kind):
    args = operands(kind, 264, 480, 1000)
    for out_dtype in ("bfloat16", "float32"):
        expected = None
        for config in every_gemm_config(CONFIGS_OF[kind], out_dtype):
            out = mosaic_gpu.multiply(
                *args, **tiles(kind), out_dtype=out_dtype, config=config
            )
            expected = out if expected is None else expected
            assert bool((out == expected).all()), config


# Nothing leaks: poison where no number belongs.


@pytest.mark.gpu
@each_kind
@each_out_dtype
@pytest.mark.parametrize(
    ("m", "n", "k"),
    # m and n that need no padding, so that the kernel writes the donated buffer; no
    # multiples of a block.
    [(8, 64, 128), (16, 96, 300), (136, 160, 384), (264, 2080, 129), (1000, 4128, 640)],
)
def test_every_element_of_a_poisoned_output_is_written(kind, m, n, k, out_dtype):
    args = operands(kind, m, n, k)
    run = gemm(kind, out_dtype)
    expected = jax.jit(run)(*args)
    out, same_buffer = run_on_poisoned_output(run, args, (m, n), out_dtype)
    assert same_buffer, "the output was not the poisoned buffer: nothing is tested"
    assert bool(jnp.isfinite(out).all())
    assert_same_bits(out, expected)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (65, 33, 127), (129, 200, 300), (1001, 1003, 3884)]
)
def test_nan_beyond_ragged_sides_leaks_nowhere(kind, m, n, k):
    args = operands(kind, m, n, k)
    run = gemm(kind)
    expected = jax.jit(run)(*args)
    assert np.isfinite(np.asarray(expected, np.float32)).all()

    # Each operand as the corner of an array that is NaN elsewhere.
    def around(x):
        rows, columns = x.shape
        poisoned = np.full((rows + 24, columns + 136), np.nan, x.dtype)
        assert np.isnan(poisoned.astype(np.float32)).all()
        poisoned[:rows, :columns] = x
        return jnp.asarray(poisoned)

    def corner(*poisoned):
        pairs = zip(poisoned, args, strict=True)
        return run(*(p[: x.shape[0], : x.shape[1]] for p, x in pairs))

    poisoned = [around(x) for x in args]
    assert_same_bits(jax.jit(corner)(*poisoned), expected)

    # And in memory that was free a moment ago, from which scratch and padding are cut.
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        nan = np.full((size,), np.nan, np.float32)
        blocks = [jnp.array(nan) for _ in range(8)]
        jax.block_until_ready(blocks)
        for block in blocks:
            block.delete()
        assert_same_bits(jax.jit(run)(*args), expected)


# Nothing is lost: promotion.

K = 16384
# What each k32 step cuts off inside a chunk: 4 steps of 32 addends, half of 2^-14 each,
# of a running sum that is 3/8 of the chunk's on average: 1.5e-3. Output in float32.
PROMOTED_ERROR = 2e-3


def worst_error(out, args, kind):
    """Of a product of positive numbers, relative to the one in float64."""
    total = gemm_float64(*map(np.asarray, args), **tiles(kind))
    return np.abs(np.asarray(out, np.float64) / total - 1).max()


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("m", [16, 128, 256])
def test_promotion_keeps_a_long_positive_sum(kind, m):
    args = operands(kind, m, 256, K, draw=positive_uniform)
    out = jax.jit(gemm(kind, "float32"))(*args)
    assert worst_error(out, args, kind) < PROMOTED_ERROR


def promoted_rarely(lhs, lhs_scale, rhs, rhs_scale, *, every, product):
    """A broken GEMM that promotes every `every` of k, with scales that are all one."""
    del lhs_scale, rhs_scale
    total = jnp.float32(0)
    for start in range(0, lhs.shape[1], every):
        columns = slice(start, start + every)
        total += product(lhs[:, columns], rhs[:, columns])
    return total


def unscaled(kind, m, n):
    """Positive codes with scales of one, which a GEMM that drops them passes."""
    rng = np.random.default_rng(0)
    codes = [
        jnp.asarray(positive_uniform(rng, (side, K))).astype(jnp.float8_e4m3fn)
        for side in (m, n)
    ]
    lhs_scale, rhs_scale = (
        jnp.ones((-(-rows // tile[0]), K // 128))
        for rows, tile in zip((m, n), TILES[kind], strict=True)
    )
    return codes[0], lhs_scale, codes[1], rhs_scale


def summed_by_the_tensor_core(lhs, rhs):
    """The product of [64, k] and [64, k] transposed, in the accumulator of wgmma alone.

    XLA's own product would not do: it is free to sum pieces of k in float32.
    """
    rows, k = lhs.shape

    def body(lhs, rhs, out, lhs_smem, rhs_smem, out_smem, arrived):
        def accumulate(acc):
            @pl.loop(0, k // 128)
            def _chunk(i):
                columns = pl.ds(i * 128, 128)
                plgpu.copy_gmem_to_smem(lhs.at[:, columns], lhs_smem, arrived)
                plgpu.copy_gmem_to_smem(rhs.at[:, columns], rhs_smem, arrived)
                plgpu.barrier_wait(arrived)
                plgpu.wgmma(acc, lhs_smem, rhs_smem.T)
                plgpu.wgmma_wait(0)

            return acc[...]

        acc = plgpu.ACC((rows, rows), jnp.float32)
        out_smem[...] = pl.run_scoped(accumulate, acc)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        plgpu.wait_smem_to_gmem(0)

    codes = plgpu.SMEM((rows, 128), lhs.dtype, transforms=swizzled(128, 128))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, rows), jnp.float32),
        scratch_types={
            "lhs_smem": codes,
            "rhs_smem": codes,
            "out_smem": plgpu.SMEM(
                (rows, rows), jnp.float32, transforms=swizzled(32, 128)
            ),
            "arrived": plgpu.Barrier(num_arrivals=2),
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(lhs, rhs)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("every", [4096, K])
def test_a_gemm_that_promotes_rarely_fails_the_promotion_test(kind, every):
    args = unscaled(kind, 64, 64)
    broken = functools.partial(
        promoted_rarely, every=every, product=summed_by_the_tensor_core
    )
    assert worst_error(jax.jit(broken)(*args), args, kind) > 5 * PROMOTED_ERROR
    out = jax.jit(gemm(kind, "float32"))(*args)
    assert worst_error(out, args, kind) < PROMOTED_ERROR


def tensor_core(lhs, rhs):
    """As Hopper sums: 32 products and the sum so far, cut off at one place for all.

    That place lies 13 bits below the largest of them.
    """
    lhs, rhs = (np.asarray(x).astype(np.float64) for x in (lhs, rhs))
    total = np.zeros((lhs.shape[0], rhs.shape[0]))
    for start in range(0, lhs.shape[1], 32):
        step = slice(start, start + 32)
        addends = lhs[:, None, step] * rhs[None, :, step]
        addends = np.concatenate((addends, total[..., None]), -1)
        largest = addends.max(-1, keepdims=True)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-30))) - 13)
        total = (np.floor(addends / unit) * unit).sum(-1)
    return jnp.asarray(total, jnp.float32)


@pytest.mark.parametrize(("every", "passes"), [(128, True), (4096, False), (K, False)])
def test_the_promotion_test_tells_promotion_from_none(every, passes):
    args = unscaled("1d2d", 8, 8)
    out = promoted_rarely(*args, every=every, product=tensor_core)
    error = worst_error(out, args, "1d2d")
    assert (error < PROMOTED_ERROR) == passes
    assert passes or error > 5 * PROMOTED_ERROR


# The shapes that DeepGEMM and SGLang test with.

SHAPES = [
    (m, n, k)
    for n, k in (
        (2112, 7168),
        (576, 7168),
        (24576, 1536),
        (32768, 512),
        (7168, 16384),
        (4096, 7168),
        (7168, 2048),
        (7748, 3884),
    )
    for m in (1, 128, 4096)
]


def difference(x, y):
    """`1 - 2 <x, y> / (|x|^2 + |y|^2)`, written without its cancellation."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum((x - y) ** 2) / (jnp.sum(x**2) + jnp.sum(y**2))


@jax.jit
def differences(out, wide, plain, exact):
    """Of a product from the unquantized one; in float32, and itself, from `exact`."""
    pairs = (out, plain), (wide, exact), (out, exact)
    return tuple(difference(x, y) for x, y in pairs)


def float32_product(x, y):
    dims = (((1,), (1,)), ((), ()))
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def products(key, sides, k, specs):
    """Two matrices' codes, and the products of the matrices and of the codes."""
    values = [
        jax.random.normal(key, (side, k), jnp.bfloat16)
        for key, side in zip(jax.random.split(key), sides, strict=True)
    ]
    # By XLA's kernel, as everything here: one program to compile.
    codes = [
        fp8jax.quantize(x, spec, implementation="xla")
        for x, spec in zip(values, specs, strict=True)
    ]
    exact = float32_product(*(q.dequantize() for q in codes))
    return *codes, float32_product(*values), exact


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_error_on_deepgemm_s_shapes(kind, m, n, k):
    specs = tuple(fp8jax.QuantSpec(tile) for tile in TILES[kind])
    q_x, q_w, plain, exact = products(jax.random.key(m + n + k), (m, n), k, specs)
    product = functools.partial(
        fp8jax.scaled_matmul, q_x, q_w, implementation="mosaic_gpu"
    )
    out, wide = product(), product(out_dtype=jnp.float32)
    to_plain, wide_to_exact, to_exact = differences(out, wide, plain, exact)
    # DeepGEMM's own limit: two operands of 2.6 % in rms each are 1.3e-3 of squares, of
    # which this measure has half, 7e-4. The next is what chunks lose in the tensor
    # core: PROMOTED_ERROR squared is 4e-6 for sums of one sign, and less for these.
    assert to_plain < 1e-3
    assert wide_to_exact < 1e-6
    assert to_exact < 1e-6 + 2.0**-19  # And BF16's own rounding.


# Every config can be compiled, as far as a machine without a GPU can tell.

CONFIGS = [
    pytest.param(kind, out_dtype, config, id=f"{kind}-{out_dtype}-{i}")
    for kind, configs_of in CONFIGS_OF.items()
    for out_dtype in ("bfloat16", "float32")
    for i, config in enumerate(every_gemm_config(configs_of, out_dtype))
]


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 or newer"
)
@pytest.mark.parametrize(("kind", "out_dtype", "config"), CONFIGS)
def test_lowers_with_every_config(kind, out_dtype, config):
    assert mosaic_gpu.refusal(CONFIGS_OF[kind], config) is None
    m, n, k = 520, 1056, 640
    args = [
        aval
        for rows, tile in zip((m, n), TILES[kind], strict=True)
        for aval in (
            jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((-(-rows // tile[0]), k // 128), jnp.float32),
        )
    ]
    run = functools.partial(
        mosaic_gpu.multiply, **tiles(kind), out_dtype=out_dtype, config=config
    )
    lowered = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
