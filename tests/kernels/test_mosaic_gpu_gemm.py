"""The Mosaic GPU GEMM: its real code in interpret mode, and on a GPU.

Operands are small integers, whose sums the tensor core keeps exactly, with a scale of
its own for every tile: what remains is the float32 rounding of the promotion, which the
bounds below count. Codes of full range are compared with cuBLASLt, bit for bit.
"""

import contextlib
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels import mosaic_gpu
from fp8jax.kernels.mosaic_gpu import _config, _gemm
from fp8jax.numerics import scale_shape
from fp8jax.testing import EDGE_SIZES, distinct_scales
from tests.kernels.trust import assert_promoted_sum, small_codes

_TILES = ((128, 128), (1, 128))  # Of the rhs: 1d2d and 1d1d.

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
both_gemms = pytest.mark.parametrize("rhs_tile", _TILES, ids=("1d2d", "1d1d"))


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def _operands(
    m: int, n: int, k: int, rhs_tile: tuple[int, int], dtype=jnp.float8_e4m3fn
) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(m * 31 + n * 17 + k)
    lhs, rhs = (small_codes(rng, (side, k), dtype) for side in (m, n))
    return lhs, _scales(rng, m, k), rhs, _scales(rng, n, k, rhs_tile)


def _scales(rng, rows: int, k: int, tile: tuple[int, int] = (1, 128)) -> jax.Array:
    return jnp.asarray(distinct_scales(rng, scale_shape((rows, k), tile)))


def _product(rhs_tile: tuple[int, int], out_dtype=jnp.float32):
    return functools.partial(
        mosaic_gpu.gemm, lhs_tile=(1, 128), rhs_tile=rhs_tile, out_dtype=out_dtype
    )


def _check_blocked_lhs(m: int, n: int, k: int, out_dtype=jnp.float32) -> None:
    """With the lhs in blocks, the product is the other one's transpose, to the bit."""
    rows, row_scales, blocks, block_scales = _operands(m, n, k, (128, 128))
    run = functools.partial(mosaic_gpu.gemm, out_dtype=out_dtype)
    tiles = {"lhs_tile": (128, 128), "rhs_tile": (1, 128)}
    out = jax.jit(functools.partial(run, **tiles))(
        blocks, block_scales, rows, row_scales
    )
    same = _product((128, 128), out_dtype)(rows, row_scales, blocks, block_scales)
    assert out.shape == (n, m)
    np.testing.assert_array_equal(out, same.T)


def _check(out: jax.Array, operands: tuple[jax.Array, ...], rhs_tile) -> None:
    assert_promoted_sum(out, *operands, lhs_tile=(1, 128), rhs_tile=rhs_tile)


@interpreted
@both_gemms
@pytest.mark.parametrize(
    ("m", "n", "k"), [(256, 128, 256), (1, 1, 1), (136, 160, 300), (65, 17, 127)]
)
def test_interpreted_product_is_the_oracles(m, n, k, rhs_tile):
    operands = _operands(m, n, k, rhs_tile)
    with _interpreting():
        out = jax.jit(_product(rhs_tile))(*operands)
    _check(out, operands, rhs_tile)


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), [(256, 128, 256), (1, 3, 1), (136, 160, 300)])
def test_interpreted_blocked_lhs(m, n, k):
    with _interpreting():
        _check_blocked_lhs(m, n, k)


def _check_turned(m: int, n: int, k: int, out_dtype=jnp.float32) -> None:
    """Few rows make the transposed product: of the same bits as the plain one."""
    operands = _operands(m, n, k, (128, 128))
    turned = mosaic_gpu.computed_config("1d2d", m, n, k, "float32", 132)
    assert turned.turned
    plain = _config.GemmConfig(
        64, 64, "n", chunks=2, accumulators=2, stages=3, cluster=1
    )
    run = functools.partial(_gemm.multiply, rhs_tile=(128, 128), out_dtype=out_dtype)
    out, same = (run(*operands, config=config) for config in (turned, plain))
    assert out.shape == (m, n)
    np.testing.assert_array_equal(out, same)


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 1), (16, 160, 700), (27, 200, 300)])
def test_interpreted_turned_product_has_the_same_bits(m, n, k):
    with _interpreting():
        _check_turned(m, n, k)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("m", [1, 8, 13, 16, 17, 32])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (576, 1408), (96, 300), (7, 100)])
def test_turned_product_has_the_same_bits(m, n, k, out_dtype):
    _check_turned(m, n, k, out_dtype)


@interpreted
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="interpret mode of JAX 0.11 hangs on clusters with several blocks",
)
def test_interpreted_cluster_past_the_last_row():
    operands = _operands(264, 160, 384, (128, 128))
    config = _config.GemmConfig(
        128, 128, "m", chunks=2, accumulators=2, stages=2, cluster=2
    )
    with _interpreting():
        out = _gemm.multiply(
            *operands, rhs_tile=(128, 128), out_dtype=jnp.float32, config=config
        )
    _check(out, operands, (128, 128))


@interpreted
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16])
def test_interpreted_output_dtypes(out_dtype):
    operands = _operands(16, 32, 256, (128, 128))
    with _interpreting():
        out = _product((128, 128), out_dtype)(*operands)
    assert out.dtype == out_dtype
    _check(out, operands, (128, 128))


@interpreted
@both_gemms
def test_interpreted_nan_scale_stays_in_its_row_or_tile(rhs_tile):
    _check_nan_isolation(rhs_tile, m=72, n=160, k=300, context=_interpreting)


@interpreted
@both_gemms
def test_lowers_with_64_bit_types_enabled(rhs_tile):
    # Not by interpret mode, whose own callbacks fail with 64-bit types.
    operands = _operands(72, 40, 300, rhs_tile)
    with jax.enable_x64(True):
        traced = jax.jit(_product(rhs_tile)).trace(*operands)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@both_gemms
def test_with_64_bit_types_enabled(rhs_tile):
    operands = _operands(200, 320, 576, rhs_tile)
    with jax.enable_x64(True):
        out = jax.jit(_product(rhs_tile))(*operands)
    _check(out, operands, rhs_tile)


@interpreted
def test_interpreted_under_vmap_and_scan():
    _check_vmap_and_scan(m=8, n=32, k=128, context=_interpreting)


_BATCH_TILES = (((1, 128), (128, 128)), ((1, 128), (1, 128)), ((128, 128), (1, 128)))
every_batch = pytest.mark.parametrize(
    "tiles", _BATCH_TILES, ids=["1d2d", "1d1d", "2d1d"]
)


@interpreted
@every_batch
def test_interpreted_batch_is_one_launch_with_the_bits_of_each_entry(tiles):
    _check_batch(tiles, (3, 16, 160, 200), _interpreting)


@interpreted
def test_interpreted_batch_of_batches_has_the_bits_of_each_entry():
    _check_batch(_BATCH_TILES[0], (1, 16, 128, 128), _interpreting, nested=True)


def test_refuses_what_it_cannot_do():
    lhs, lhs_scale, rhs, rhs_scale = _operands(8, 8, 128, (128, 128))
    gemm = functools.partial(mosaic_gpu.gemm, out_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"got \(\(1, 64\), \(128, 128\)\)"):
        gemm(lhs, lhs_scale, rhs, rhs_scale, lhs_tile=(1, 64), rhs_tile=(128, 128))
    with pytest.raises(NotImplementedError, match="got bfloat16"):
        _product((128, 128))(lhs.astype(jnp.bfloat16), lhs_scale, rhs, rhs_scale)
    with pytest.raises(NotImplementedError, match="out_dtype=int32"):
        _product((128, 128), jnp.int32)(lhs, lhs_scale, rhs, rhs_scale)


def _check_nan_isolation(rhs_tile, *, m, n, k, context) -> None:
    lhs, lhs_scale, rhs, rhs_scale = _operands(m, n, k, rhs_tile)
    last = lhs_scale.shape[1] - 1  # The short chunk, next to the padding.
    bad_row, bad_column = np.array(lhs_scale), np.array(rhs_scale)
    bad_row[5, last] = bad_column[-1, last] = np.nan
    run = jax.jit(_product(rhs_tile))
    with context():
        clean = np.asarray(run(lhs, lhs_scale, rhs, rhs_scale))
        row = np.asarray(run(lhs, bad_row, rhs, rhs_scale))
        column = np.asarray(run(lhs, lhs_scale, rhs, bad_column))
    others = np.arange(m) != 5
    assert np.isnan(row[5]).all()
    np.testing.assert_array_equal(row[others], clean[others])
    poisoned = np.arange(n) // rhs_tile[0] == rhs_scale.shape[0] - 1
    assert np.isnan(column[:, poisoned]).all()
    np.testing.assert_array_equal(column[:, ~poisoned], clean[:, ~poisoned])


def _check_vmap_and_scan(*, m, n, k, context) -> None:
    gemm = _product((128, 128))
    lhs, lhs_scale, rhs, rhs_scale = _operands(2 * m, n, k, (128, 128))
    batch = (lhs.reshape(2, m, k), lhs_scale.reshape(2, m, -1))

    def step(carry, x):
        return carry, gemm(*x, rhs, rhs_scale)

    with context():
        whole = np.asarray(gemm(lhs, lhs_scale, rhs, rhs_scale)).reshape(2, m, n)
        mapped = jax.vmap(gemm, in_axes=(0, 0, None, None))(*batch, rhs, rhs_scale)
        _, scanned = jax.jit(lambda xs: lax.scan(step, jnp.float32(0), xs))(batch)
    np.testing.assert_array_equal(np.asarray(mapped), whole)
    np.testing.assert_array_equal(np.asarray(scanned), whole)


def _batched_product(tiles):
    how = dict(zip(("lhs_tile", "rhs_tile"), tiles, strict=True))
    return jax.vmap(functools.partial(mosaic_gpu.gemm, **how, out_dtype=jnp.float32))


def _check_batch(tiles, shape, context, nested=False) -> None:
    b, m, n, k = shape
    entries = []
    for i in range(b):
        rng = np.random.default_rng(i)
        lhs, rhs = (
            (small_codes(rng, (rows, k)), _scales(rng, rows, k, tile))
            for rows, tile in zip((m, n), tiles, strict=True)
        )
        entries.append((*lhs, *rhs))
    how = dict(zip(("lhs_tile", "rhs_tile"), tiles, strict=True))
    one = jax.jit(functools.partial(mosaic_gpu.gemm, **how, out_dtype=jnp.float32))
    with context():
        want = np.stack([np.asarray(one(*entry)) for entry in entries])
        operands = map(np.stack, zip(*entries, strict=True))
        run = _batched_product(tiles)
        if nested:
            run, operands = jax.vmap(run), (x[None] for x in operands)
        got = np.asarray(jax.jit(run)(*operands)).reshape(want.shape)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("m", "n", "cluster"), [(100, 65536, 1), (2048, 2048, 1), (1100, 4200, 2)]
)
def test_a_cluster_takes_more_than_two_waves_of_blocks(m, n, cluster):
    config = mosaic_gpu.choose_config("1d2d", m, n, 8192, "bfloat16", 132)
    assert config.cluster == cluster


def _shapes() -> list[tuple[int, int, int]]:
    """Every side at every place, in two mixtures, and clusters with an odd block."""
    sides = len(EDGE_SIZES)
    mixed = [
        (
            EDGE_SIZES[i],
            EDGE_SIZES[(2 * i + s) % sides],
            EDGE_SIZES[(4 * i + 3 * s) % sides],
        )
        for s in (1, 2)
        for i in range(sides)
    ]
    return [*mixed, (1100, 4200, 576), (64, 4096, 1024), (100, 17000, 384)]


@pytest.mark.gpu
@both_gemms
@pytest.mark.parametrize(("m", "n", "k"), _shapes())
def test_product_is_the_oracles(m, n, k, rhs_tile):
    operands = _operands(m, n, k, rhs_tile)
    _check(jax.jit(_product(rhs_tile))(*operands), operands, rhs_tile)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [*_shapes(), (1, 1, 256), (33, 64, 256)])
def test_blocked_lhs(m, n, k, out_dtype):
    _check_blocked_lhs(m, n, k, out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles", [((1, 128), (128, 128)), ((1, 128), (1, 128)), ((128, 128), (1, 128))]
)
@pytest.mark.parametrize(("m", "n", "k"), [(200, 320, 576), (33, 70, 300), (8, 64, 1)])
def test_accumulates_in_float32(m, n, k, tiles):
    if tiles[0][0] > 1:
        rhs, rhs_scale, lhs, lhs_scale = _operands(n, m, k, tiles[0])
    else:
        lhs, lhs_scale, rhs, rhs_scale = _operands(m, n, k, tiles[1])
    start = jax.random.normal(jax.random.key(0), (m, n))
    run = functools.partial(
        mosaic_gpu.gemm, lhs_tile=tiles[0], rhs_tile=tiles[1], out_dtype=jnp.float32
    )
    product = jax.jit(run)(lhs, lhs_scale, rhs, rhs_scale)
    out = jax.jit(run)(lhs, lhs_scale, rhs, rhs_scale, start)
    np.testing.assert_array_equal(out, start + product)


@pytest.mark.parametrize("donate", [True, False])
def test_accumulation_is_in_place(donate):
    """No copy of what it adds to, if that may be overwritten; else exactly one."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("kernels that change an operand came with JAX 0.11")
    shapes = jax.eval_shape(functools.partial(_operands, 256, 512, 512, (1, 128)))
    start = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    run = jax.jit(_product((1, 128)), donate_argnums=(4,) if donate else ())
    text = run.trace(*shapes, start).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"output_operand_alias<.*operand_index = 4", text)
    assert ("jax.buffer_donor" in text or "tf.aliasing_output" in text) == donate


@pytest.mark.gpu
@both_gemms
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16])
def test_output_dtypes(out_dtype, rhs_tile):
    operands = _operands(200, 320, 576, rhs_tile)
    _check(_product(rhs_tile, out_dtype)(*operands), operands, rhs_tile)


@pytest.mark.gpu
@both_gemms
@pytest.mark.parametrize("m", [1, 8, 65, 129])
@pytest.mark.parametrize("n", [1, 7, 32, 33, 64])
def test_few_columns_in_bfloat16(m, n, rhs_tile):
    # Blocks reach past an output as narrow as this; what lies there must not be stored.
    operands = _operands(m, n, 256, rhs_tile)
    run = jax.jit(_product(rhs_tile, jnp.bfloat16))
    for _ in range(5):
        _check(run(*operands), operands, rhs_tile)


@pytest.mark.gpu
@both_gemms
def test_e5m2_operands(rhs_tile):
    operands = _operands(256, 256, 512, rhs_tile, jnp.float8_e5m2)
    _check(_product(rhs_tile)(*operands), operands, rhs_tile)


def _full_range(m: int, n: int, k: int, rhs_tile) -> tuple[jax.Array, ...]:
    # From NumPy's normal numbers: every exponent, but few codes near the limit.
    rng = np.random.default_rng(m + n + k)
    lhs, rhs = (
        rng.standard_normal((side, k), np.float32) * np.float32(60) for side in (m, n)
    )
    return (
        jnp.asarray(lhs.astype(jnp.float8_e4m3fn)),
        _scales(rng, m, k),
        jnp.asarray(rhs.astype(jnp.float8_e4m3fn)),
        _scales(rng, n, k, rhs_tile),
    )


@pytest.mark.gpu
@both_gemms
@pytest.mark.parametrize("m", [100, 1900])
def test_nan_scale_stays_in_its_row_or_tile(m, rhs_tile):
    context = contextlib.nullcontext
    _check_nan_isolation(rhs_tile, m=m, n=1700, k=576, context=context)


@pytest.mark.gpu
def test_xla_cancels_the_transposes_around_the_kernels():
    # Quantization writes codes and scales as the GEMMs read them; only the arrays that
    # the user sees are transposed, and no kernel may be left to do it.
    quantize = functools.partial(
        mosaic_gpu.quantize, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0
    )

    def fprop(x, w):
        x, w = quantize(x, tile=(1, 128)), quantize(w, tile=(128, 128))
        return _product((128, 128))(*x, *w)

    def wgrad(x, dout):
        x, dout = (quantize(y, tile=(128, 1)) for y in (x, dout))
        return _product((1, 128))(*(y.T for y in (*x, *dout)))

    x, w, dout = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((2048, 1024), (512, 1024), (2048, 512))
    )
    for fn, args in ((fprop, (x, w)), (wgrad, (x, dout))):
        hlo = jax.jit(fn).lower(*args).compile().as_text()
        launches = re.findall(r" (custom-call|fusion|transpose|copy)\(", hlo)
        assert launches == ["custom-call"] * 3, launches


@pytest.mark.gpu
@every_batch
@pytest.mark.parametrize(
    "shape",
    [(8, 384, 512, 256), (3, 200, 320, 200), (5, 20, 96, 512), (2, 1, 64, 128)],
)
def test_batch_is_one_launch_with_the_bits_of_each_entry(tiles, shape):
    _check_batch(tiles, shape, contextlib.nullcontext)


@pytest.mark.gpu
def test_under_vmap_and_scan():
    _check_vmap_and_scan(m=200, n=320, k=384, context=contextlib.nullcontext)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 7168, 4096), (4096, 4096, 7168), (8192, 8192, 8192)]
)
def test_bits_are_cublaslts(m, n, k):
    torch = pytest.importorskip("torch")
    lhs, lhs_scale, rhs, rhs_scale = _full_range(m, n, k, (128, 128))

    def codes(x: jax.Array):
        octets = lax.bitcast_convert_type(x, jnp.uint8)
        return torch.from_dlpack(octets).view(torch.float8_e4m3fn)

    expected = torch._scaled_mm(
        codes(lhs),
        codes(rhs).t(),
        scale_a=torch.from_dlpack(jnp.asarray(lhs_scale.T)).t(),
        scale_b=torch.from_dlpack(rhs_scale).t(),
        out_dtype=torch.bfloat16,
    )
    out = jax.jit(_product((128, 128), jnp.bfloat16))(lhs, lhs_scale, rhs, rhs_scale)
    assert bool((torch.from_dlpack(out) == expected).all())
