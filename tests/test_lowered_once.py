"""GPU kernels: lowered once for all programs, and compiled while JAX goes on."""

import re
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic import gpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _dispatch, _lowered_once, ops
from fp8jax.ops._product import MATRICES

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)
SQUARE = (256, 256), (256, 256)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """As where a Hopper GPU is."""
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    _lowered_once._exported.cache_clear()
    _lowered_once._jitted.cache_clear()


def product(x, w):
    specs = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
    return ops.quantized_dot(x, w, MATRICES, *specs)


def program(fn, *shapes, platforms=("cuda",)):
    """The program of a function, not traced before, of arrays of these shapes."""
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    traced = jax.jit(lambda *args: fn(*args)).trace(*args)
    return traced.lower(lowering_platforms=platforms).as_text()


def kernels(fn, *shapes):
    return len(re.findall("custom_call @mosaic_gpu", program(fn, *shapes)))


def lowered():
    return _lowered_once._exported.cache_info().misses


def test_equal_kernels_of_several_programs_are_lowered_once():
    for _ in range(3):
        assert kernels(product, *SQUARE) == 3
    assert lowered() == 3
    # Another product with the same weight's kernel: x's and the GEMM are new.
    assert kernels(product, (512, 256), (256, 256)) == 3
    assert lowered() == 5


def test_a_trace_lowers_nothing_and_looks_at_no_kernels_body(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", lambda *_, **__: pytest.fail("traced"))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SQUARE)
    assert jax.eval_shape(product, x, w).shape == (256, 256)
    assert lowered() == 0


def test_a_step_traces_its_own_kernels_alone_and_infers_no_layout(monkeypatch):
    bodies = []

    def kernel(body, **options):
        bodies.append(body)
        return launch(body, **options)

    launch = plgpu.kernel
    monkeypatch.setattr(plgpu, "kernel", kernel)
    # A third of what it takes to lower a kernel that does not say where its values lie.
    monkeypatch.setattr(
        gpu.layout_inference, "infer_layout", lambda *_, **__: pytest.fail("inferred")
    )

    @fp8jax.fp8_transform
    def step(x, w):
        def loss(w):
            return jnp.sum(jnp.tanh(x @ w) @ w)

        return w - jax.grad(loss)(w)

    # The passes take quantizations one by one for two at once and for fused ones:
    # what they take them from was asked for its types, and runs nowhere.
    asked = _lowered_once._types_of.cache_info().misses
    program(step, (384, 384), (384, 384))  # Shapes of no other test.
    asked = _lowered_once._types_of.cache_info().misses - asked
    assert 0 < len(bodies) == lowered() < asked


def test_ptxas_is_asked_once_which_ptx_it_takes(monkeypatch):
    asked = []

    def ask():  # It starts a process.
        asked.append(ask)
        return 90

    extension = types.SimpleNamespace(_get_ptxas_isa_version=ask)
    library = types.SimpleNamespace(_mosaic_gpu_ext=extension)
    monkeypatch.setattr(gpu.fragmented_array, "mgpu_lib", library)
    assert kernels(product, *SQUARE) == 3
    assert len(asked) == 1


def test_results_of_a_weakly_typed_array_are_of_a_type():
    def codes(x):
        return fp8jax.quantize(x, implementation="mosaic_gpu")

    weak = jax.eval_shape(lambda: jnp.full((128, 128), 2.0))
    assert weak.weak_type
    jaxpr = jax.make_jaxpr(lambda: codes(jnp.full((128, 128), 2.0)))()
    assert not any(x.weak_type for x in jaxpr.out_avals)


@pytest.mark.parametrize("in_axes", [(0, None), (0, 0)])
def test_mapped_kernels_are_mapped_by_their_own_rules(in_axes):
    shapes = [(4, 256, 256) if a == 0 else (256, 256) for a in in_axes]
    # In one launch or in a loop's body: each kernel stands there once.
    for _ in range(2):
        assert kernels(jax.vmap(product, in_axes), *shapes) == 3
    assert lowered() == 3


def test_in_a_shard_map_a_kernel_says_what_it_varies_over():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        product, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"), check_vma=True
    )
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 256), (256, 256))]
    text = str(jax.make_jaxpr(split)(*args))
    assert "pallas_call" in text or "mpmd_map" in text
    assert _lowered_once._KERNEL.name not in text


def test_each_kernel_is_compiled_ahead_once_where_a_gpu_is(monkeypatch):
    compiled, is_done = [], threading.Event()

    def compile_(made):
        compiled.append((made.fun_name, threading.current_thread()))
        if len(compiled) == 3:
            is_done.set()

    monkeypatch.setattr(_lowered_once, "_compile", compile_)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for _ in range(2):
        assert kernels(product, *SQUARE) == 3
    assert is_done.wait(60)
    assert len(compiled) == 3
    assert threading.main_thread() not in {thread for _, thread in compiled}


def test_nothing_is_compiled_ahead_where_no_gpu_is(monkeypatch):
    monkeypatch.setattr(_lowered_once, "_thread", lambda: pytest.fail("compiled"))
    assert kernels(product, *SQUARE) == 3


def test_what_does_not_compile_ahead_is_left_to_the_program(monkeypatch):
    made = []
    monkeypatch.setattr(_lowered_once, "_compile_ahead", made.append)
    program(product, *SQUARE)
    assert len(made) == 3
    with pytest.raises(ValueError, match="exported for platforms"):
        jax.jit(made[0].call).lower(*made[0].in_avals)  # No GPU is here.
    _lowered_once._compile(made[0])


def test_a_program_for_several_platforms_lowers_its_own_kernels():
    text = program(product, *SQUARE, platforms=("cpu", "cuda"))
    assert len(re.findall("custom_call @mosaic_gpu", text)) == 3
    assert lowered() == 0
