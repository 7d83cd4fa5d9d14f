"""The benchmarks of grouped GEMMs and of mixtures of experts, on a CPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _contenders, _ragged, grouped, moe
from fp8jax.kernels import xla
from tests.benchmarks.running import rows, run


def test_grouped_gemms_beside_dense_ones_and_bf16(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(grouped, "IMPLEMENTATION", "xla")
    wgrad = [((128, 256), 128, 256)]
    shapes = {"1d2d": [((5, 0, 59), 128, 128)], "1d1d": wgrad, "2d1d": wgrad}
    monkeypatch.setattr(grouped, "SHAPES", shapes)
    run(monkeypatch, grouped, "--rounds 1")
    one, two, three = rows(on_cpu / "grouped.csv")
    assert [r["gemm"] for r in (one, two, three)] == ["1d2d", "1d1d", "2d1d"]
    assert (one["sizes"], one["m"], one["n"], one["k"]) == (
        "5 0 59",
        "64",
        "128",
        "128",
    )
    assert (two["m"], two["n"], two["k"]) == ("128", "256", "384")
    for row in (one, two, three):
        assert float(row["of_dense"]) > 0
        assert float(row["over_bf16"]) > 0
        assert (row["pallas_bf16"], row["pallas_blocks"]) == ("", "")
    assert "pallas_bf16 in Blocks(m=128, n=128, k=64, steps=4) is left out: " in (
        capsys.readouterr().out
    )
    run(monkeypatch, grouped, "--rounds 1 --only 1d2d --without lax_bf16 pallas_bf16")
    (row,) = rows(on_cpu / "grouped.csv")
    assert row["lax_bf16"] == row["over_bf16"] == ""
    assert row["dense_bf16"] != ""
    assert "left out" not in capsys.readouterr().out


def relative(out, expected):
    out, expected = (jnp.asarray(a, jnp.float32) for a in (out, expected))
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["1d2d", "1d1d", "2d1d"])
def test_every_contender_of_a_grouped_gemm_makes_its_product(kind, monkeypatch):
    monkeypatch.setattr(grouped, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(_contenders.mosaic_gpu, "gemm", xla.gemm)
    sizes, m, n, k = (256, 128), 128, 256, 384
    make = grouped._wgrad
    if kind == "1d2d":
        sizes, m, n, k, make = (100, 0, 156), 256, 128, 384, grouped._fprop
    ours, others, _ = make(kind, sizes, m, n, k)
    out = {name: c.launch() for name, c in (ours | others).items()}
    groups = {out["fp8jax"].shape[0], out["lax_bf16"].shape[0]}
    assert groups == ({m} if kind == "1d2d" else {len(sizes)})
    # A group's first rows or its whole product: of the dense one's, in both.
    dense = {True: out["dense"], False: out["dense_bf16"]}
    for in_fp8, name in ((True, "fp8jax"), (False, "lax_bf16")):
        # One rounding to bfloat16 in each: an ulp, 2^-7.
        if kind == "1d2d":
            assert relative(out[name][:100], dense[in_fp8][:100]) < 2**-7
        else:
            assert relative(out[name].sum(0), dense[in_fp8]) < 2**-7
        dtype = jnp.bfloat16 if kind == "1d2d" else jnp.float32
        assert out[name].dtype == dense[in_fp8].dtype == dtype


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas' kernels run here, by interpretation, as on a GPU of two processors."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("interpret mode came with JAX 0.11")
    pytest.importorskip("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    real = jax.devices

    class Device:
        core_count = 2

        def __getattr__(self, name):
            return getattr(real()[0], name)

    monkeypatch.setattr(jax, "devices", lambda *a: real(*a) if a else [Device()])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def ragged_operands(rows, k, n, sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, k), (len(sizes), k, n), (rows, n)
    return *(
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ), jnp.asarray(sizes, jnp.int32)


@pytest.mark.usefixtures("interpreted")
def test_pallas_products_and_their_gradients_are_ragged_dots():
    x, w, dout, sizes = ragged_operands(200, 128, 256, (100, 0, 28, 72))

    def all_of(dot):
        y, vjp = jax.vjp(lambda x, w: dot(x, w, sizes), x, w)
        return y, *vjp(dout)

    found = all_of(_ragged.pallas_ragged_dot)
    for out, expected in zip(found, all_of(_ragged.xla_rows), strict=True):
        assert out.dtype == expected.dtype
        assert relative(out, expected) < 2**-7  # One rounding to bfloat16 in each.
    columns = _ragged.xla_columns(x, dout, sizes)
    assert columns.dtype == jnp.float32
    assert relative(found[2], columns) < 2**-7
    assert not jnp.any(columns[1])


@pytest.mark.parametrize("blocks", _ragged.BLOCKS, ids=str)
def test_pallas_products_lower_in_every_block_shape(blocks, monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip("these kernels came with JAX 0.11")
    if jax.__version_info__ >= (0, 12) and blocks.m == 64:
        pytest.skip("JAX 0.12 finds no layout for half a block; it is left out there")
    pytest.importorskip("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    device = type("Device", (), {"core_count": 132})
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    x, w, dout, sizes = (
        jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a in ragged_operands(512, 512, 768, (300, 212))
    )
    for kernel, args in (
        (_ragged.pallas_rows, (x, w, sizes)),
        (_ragged.pallas_columns, (x, dout, sizes)),
    ):
        traced = jax.jit(functools.partial(kernel, blocks=blocks)).trace(*args)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_pallas_products_refuse_sides_that_blocks_do_not_divide():
    pytest.importorskip("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    x, w, _, sizes = ragged_operands(8, 64, 96, (8,))
    with pytest.raises(NotImplementedError, match="n in whole blocks of 128, got 96"):
        _ragged.pallas_rows(x, w, sizes)


MIXTURE = moe.Sizes(tokens=64, features=128, hidden=256, experts=4, top_k=2)


def test_mixture_beside_bf16_with_its_kernels(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(moe, "SIZES", [MIXTURE])
    run(monkeypatch, moe, "--rounds 1 --hlo --recipe blocked_wgrad")
    lax, dense, fp8 = rows(on_cpu / "moe.csv")
    assert [r["contender"] for r in (lax, dense)] == ["jax bf16", "dense bf16"]
    assert fp8["contender"] == "fp8jax blocked_wgrad"
    assert lax["over_lax"] == dense["over_dense"] == "1.000"
    assert float(fp8["over_lax"]) > 0
    assert fp8["over_pallas"] == ""
    assert "pallas bf16 is left out: " in capsys.readouterr().out
    kernels = (on_cpu / "moe_kernels.txt").read_text()
    assert "blocked_wgrad: Sizes(tokens=64" in kernels
    run(
        monkeypatch,
        moe,
        "--rounds 1 --recipe deepseek_v3 --without jax-bf16 pallas-bf16 dense-bf16",
    )
    (fp8,) = rows(on_cpu / "moe.csv")
    assert fp8["over_lax"] == fp8["over_dense"] == ""


def test_mixture_of_another_ragged_dot_is_the_layer_s_in_bf16():
    args = moe._arrays(MIXTURE)
    own = functools.partial(moe.moe_of, ragged_dot=_ragged.xla_rows, top_k=2)
    layer_s = functools.partial(moe.ops.moe, recipe=moe.recipes.bf16(), top_k=2)
    outputs = [moe._layer(f)(*args) for f in (own, layer_s)]
    for out, expected in zip(*outputs, strict=True):
        assert out.shape == expected.shape
        assert (out == expected).all()
    assert outputs[0][0].dtype == jnp.bfloat16
    assert outputs[0][2].dtype == jnp.float32  # The router's.


def test_flops_of_a_mixture_are_its_dense_layer_s():
    layer_, args = moe._dense(MIXTURE, moe._arrays(MIXTURE))
    cost = layer_.lower(*args).compile().cost_analysis()
    # The rest is the activation's.
    assert MIXTURE.flops <= cost["flops"] < 1.1 * MIXTURE.flops
