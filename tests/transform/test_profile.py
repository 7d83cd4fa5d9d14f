"""`.profile`: what a profiler saw becomes times of the report's rows."""

import json

import jax
import jax.numpy as jnp
import pytest

from fp8jax.transform import fp8_transform
from fp8jax.transform.plan import Report, Row
from fp8jax.transform.profile import _measure
from fp8jax.transform.profile._events import Event, busy_ns, events_of
from fp8jax.transform.profile._kinds import kind_of
from fp8jax.transform.profile._origins import Origin, Origins, origins
from fp8jax.transform.profile._profile import profile_of

D = 128
GEMM = "fp8jax_gemm_1d2d_256x256x128"

# As JAX's profiler writes it, of two streams: one of kernels, one that copies.
SPACE = """
planes {
  name: "/host:CPU"
  lines { name: "python" timestamp_ns: 0 events { metadata_id: 1 duration_ps: 9000 } }
  event_metadata { key: 1 value { id: 1 name: "step" } }
}
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #14(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 3000000 duration_ps: 2000000 }
  }
  lines {
    name: "Stream #13(Compute)" timestamp_ns: 1000
    events {
      metadata_id: 1 offset_ps: 500000 duration_ps: 3000000
      stats { metadata_id: 1 str_value: "custom-call.7" }
      stats { metadata_id: 2 uint64_value: 5 }
    }
  }
  lines {
    name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 500000 duration_ps: 3000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "fp8jax_gemm_1d2d_256x256x128" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "correlation_id" } }
}
"""


@pytest.mark.filterwarnings("error")
def test_events_are_those_of_the_streams_of_gpus_by_start():
    data = jax.profiler.ProfileData.from_text_proto(SPACE)
    assert events_of(data.planes) == [
        Event("/device:GPU:0", GEMM, "custom-call.7", 1500.0, 3000.0),
        Event("/device:GPU:0", "MemcpyD2D", "", 4000.0, 2000.0),
    ]


def event(name, op="", start=0.0, duration=1.0, device="0"):
    return Event(device, name, op, start, duration)


def test_time_of_two_streams_at_once_counts_once_as_busy():
    overlapping = [event("", start=0, duration=10), event("", start=2, duration=3)]
    assert busy_ns([*overlapping, event("", start=8, duration=4)]) == 12
    assert busy_ns([*overlapping, event("", start=20, duration=4)]) == 14


# Of a program that JAX 0.11 compiled for an H100, shortened.
HLO = """\
HloModule jit_step, is_scheduled=true

%dynamic-slice-fusion (p.1: f8e4m3fn[256,128]) -> bf16[3,256,256] {
  %p.1 = f8e4m3fn[256,128]{1,0} parameter(0)
  %mpmd_map.1 = bf16[256,256]{1,0} custom-call(%p.1), \
custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/jvp()/while/body/\
fp8jax_row_3/jit(fp8jax::fprop)/jit(gemm)/fp8jax_gemm_1d2d_256x256x128/mpmd_map"}
  ROOT %dus.1 = bf16[3,256,256]{2,1,0} dynamic-update-slice(%p.1, %mpmd_map.1), \
metadata={op_name="jit(step)/jvp()/while/body/fp8jax_row_9/dynamic_update_slice"}
}

%gemm_fusion_dot_computation (a: bf16[256,64], b: bf16[64,256]) -> f32[256,256] {
  %a = bf16[256,64]{1,0} parameter(0)
  %b = bf16[64,256]{1,0} parameter(1)
  ROOT %dot.1 = f32[256,256]{1,0} dot(%a, %b), metadata={op_name="jit(step)/\
fp8jax_row_2/bhqk/dot_general" stack_frame_id=5}
}

%fused_add (c: s32[]) -> s32[] {
  %c = s32[] parameter(0)
  ROOT %add.1 = s32[] add(%c, %c), metadata={op_name="jit(step)/add"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0), metadata={op_name="x"}
  %fusion.1 = bf16[3,256,256]{2,1,0} fusion(%x), kind=kCustom, \
calls=%dynamic-slice-fusion, metadata={op_name="jit(step)/dynamic_update_slice"}
  %gemm_fusion_dot = f32[256,256]{1,0} fusion(%x), kind=kCustom, \
calls=%gemm_fusion_dot_computation
  %fusion.2 = s32[] fusion(%x), kind=kLoop, calls=%fused_add
  %cublas-gemm.1 = (bf16[2,2]{1,0}, s8[8]{0}) custom-call(%x), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/optimizer/dot_general"}
  %mpmd_map.7 = (f32[2]{0}, s8[8]{0}) custom-call(%x), \
custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/fp8jax_row_5/jit(\
fp8jax::wgrad)/jit(gemm)/fp8jax_gemm_1d1d_256x128x512/mpmd_map"}
  %mpmd_map.8 = (f32[2]{0}, s8[8]{0}) custom-call(%x), \
custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/fp8jax_row_6/jit(\
fp8jax::wgrad)/jit(gemm)/fp8jax_gemm_1d1d_256x128x512/mpmd_map"}
  %quantized = f8e4m3fn[2]{0} fusion(%x), kind=kLoop, calls=%fused_add, \
metadata={op_name="jit(step)/fp8jax_row_4/jit(fp8jax::quantize)/convert"}
  ROOT %t = f32[2]{0} copy(%x)
}
"""


def test_origin_of_an_operation_is_that_of_the_product_within_it():
    known = origins(HLO)
    found = known.by_op
    assert found["fusion.1"] == Origin(3, multiplies=True)
    assert found["gemm_fusion_dot"] == Origin(2, multiplies=True)
    assert found["cublas-gemm.1"] == Origin(None, multiplies=True)
    assert found["quantized"] == Origin(4, quantizes=True)
    assert found["fusion.2"] == found["t"] == known.of("unknown") == Origin()
    # XLA tells of kernels in fusions what they are of; others' names have to.
    assert known.by_kernel == {"fp8jax_gemm_1d1d_256x128x512": (5, 6)}


WGRAD = "fp8jax_gemm_1d1d_256x128x512"


@pytest.mark.parametrize(
    ("name", "origin", "kind", "rows"),
    [
        (GEMM, Origin(3, multiplies=True), "product", (3,)),
        (GEMM, Origin(), "other GEMMs", ()),
        (WGRAD, Origin(), "product", (5, 6)),
        (f"{WGRAD}_mosaic_gpu_kernel", Origin(), "product", (5, 6)),
        (f"{WGRAD}0_mosaic_gpu_kernel", Origin(), "other GEMMs", ()),
        (WGRAD, Origin(3, multiplies=True), "product", (3,)),
        ("fp8jax_grouped_gemm_1d2d_8x8x8", Origin(1), "product", (1,)),
        ("fp8jax_quantize_both_1x128_128x1_8x8", Origin(3, True), "quantization", ()),
        ("loop_convert_fusion", Origin(3, quantizes=True), "quantization", ()),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", Origin(2), "product", (2,)),
        ("nvjet_hsh_128x256", Origin(None, multiplies=True), "other GEMMs", ()),
        ("gemm_fusion_dot_4", Origin(2, multiplies=True), "product", (2,)),
        ("cudnn_generated_fort_native_sdpa_sm90_flash", Origin(), "attention", ()),
        ("cudnn::fusion::compute_dot_do_o_specialized", Origin(), "attention", ()),
        ("MemcpyD2D", Origin(3), "copies", ()),
        ("ncclDevKernel_AllReduce_Sum_bf16", Origin(), "collectives", ()),
        ("input_reduce_fusion", Origin(2), "product", (2,)),
        ("loop_add_fusion", Origin(), "XLA's fusions", ()),
    ],
)
def test_kind_of_a_kernel(name, origin, kind, rows):
    known = Origins({"op": origin}, {WGRAD: (5, 6)})
    assert kind_of(event(name, "op"), known) == (kind, rows)


def row(**changed):
    sizes = {"m": 256, "n": 256, "k": 128, "flops": 2 * 256 * 256 * 128}
    base = {"path": "up", "role": "fprop", "status": "fp8", "tiles": "1x128 128x128"}
    return Row(**{**base, **sizes, "kernel": "mosaic_gpu", **changed})


REPORT = Report((row(), row(role="dgrad"), row(path="head", status="skipped")))
ORIGINS = Origins(
    {"a": Origin(0, multiplies=True), "b": Origin(2, multiplies=True)}, {}
)


def steps():
    """Two steps of 100 and 110 us on each of two devices, of 10 us without a kernel."""
    made = []
    for longer in (0, 10_000):
        step = []
        for device in "01":
            step += [
                event(GEMM, "a", 0, 20_000, device),
                event("fp8jax_quantize_1x128_8x8", "q", 30_000, 40_000, device),
                event("nvjet_hsh", "b", 70_000, 30_000 + longer, device),
            ]
        made.append(sorted(step, key=lambda e: e.start_ns))
    return made


def test_times_are_means_over_steps_and_devices():
    profile = profile_of(steps(), ORIGINS, REPORT, "a GPU")
    fprop, dgrad, head, quantization, idle = profile.rows
    assert profile.seconds == pytest.approx(105e-6)
    assert (profile.devices, profile.steps) == (2, 2)
    assert (fprop.count, dgrad.count, head.count) == (1, 0, 1)
    assert fprop.seconds == pytest.approx(20e-6)
    # Half of the FLOPs are each device's: 2 * 256 * 256 * 128 / 2 in 20 us.
    assert fprop.tflops == pytest.approx(256 * 256 * 128 / 20e-6 * 1e-12)
    assert dgrad.seconds == dgrad.tflops == 0
    in_three = profile_of(steps(), ORIGINS, REPORT, "a GPU", processes=3)
    assert in_three.rows[0].tflops == pytest.approx(fprop.tflops / 3)
    assert head.seconds == pytest.approx(35e-6)
    assert (quantization.what, quantization.product) == ("quantization", None)
    assert profile.of("quantization") == pytest.approx(40e-6)
    assert idle.seconds == pytest.approx(10e-6)
    shares = sum(r.seconds for r in profile.rows)
    assert shares == pytest.approx(profile.seconds)
    assert profile.kernels[0].name == "fp8jax_quantize_1x128_8x8"


def test_products_of_one_size_share_kernels_by_how_often_they_run():
    report = Report((row(count=1), row(path="down", count=3)))
    known = Origins({}, {GEMM: (0, 1)})
    step = [event(GEMM, "", 10 * i, 10_000) for i in range(4)]
    up, down, _ = profile_of([step], known, report, "a GPU").rows
    assert (up.count, down.count) == (1, 3)
    assert up.seconds == pytest.approx(10e-6)
    assert down.seconds == pytest.approx(30e-6)


@pytest.mark.parametrize("sharing", [1, 2, 7])
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_counts_are_whole_for_whole_numbers_of_kernels(steps, devices, sharing):
    """The parts of kernels that products share add up, whatever they round to."""
    counts = range(1, sharing + 1)
    report = Report(tuple(row(path=str(count), count=count) for count in counts))
    known = Origins({}, {GEMM: tuple(range(sharing))})
    step = [
        event(name, "", 10 * i, device=str(device))
        for device in range(devices)
        for i, name in enumerate([*[GEMM] * sum(counts), *["MemcpyD2D"] * 7])
    ]
    profile = profile_of([step] * steps, known, report, "a GPU")
    *products, copies, _ = profile.rows
    assert [r.count for r in products] == list(counts)
    assert copies.count == 7
    assert sorted(k.count for k in profile.kernels) == sorted([7, sum(counts)])


def test_products_of_an_unrolled_loop_share_kernels_as_often_as_they_run():
    """Not as often as the program holds operations of them."""
    launch = """\
  %mpmd_map.{number} = (f32[2]{{0}}, s8[8]{{0}}) custom-call(%x), \
custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(step)/fp8jax_row_{row}/jit(\
fp8jax::wgrad)/jit(gemm)/{kernel}/mpmd_map"}}
"""
    # Of a scan of four layers, two in each iteration; and of one layer.
    numbers = [0, 0, 1]
    known = origins(
        "ENTRY %main (x: f32[2]) -> f32[2] {\n"
        + "".join(
            launch.format(number=i, row=number, kernel=WGRAD)
            for i, number in enumerate(numbers)
        )
    )
    report = Report((row(path="ws", count=4), row(path="first", count=1)))
    step = [event(WGRAD, "", 10 * i, 10) for i in range(5)]
    layers, first, _ = profile_of([step] * 3, known, report, "a GPU").rows
    assert (layers.count, first.count) == (4, 1)
    assert layers.seconds == pytest.approx(40e-9)


def test_table_is_like_the_report_s():
    profile = profile_of(steps(), ORIGINS, REPORT, "a GPU")
    text = str(profile)
    assert repr(profile) == text
    lines = text.splitlines()
    head = ["path", "role", "m", "n", "k", "count", "ms", "TFLOPS", "share"]
    assert lines[0].split()[:9] == head
    fprop = "up fprop 256 256 128 1 0.02 0 19.0% 1x128 128x128 mosaic_gpu"
    assert lines[2].split()[:6] == fprop.split()[:6]
    assert lines[2].split()[-3:] == ["1x128", "128x128", "mosaic_gpu"]
    assert "quantization" in lines[5]
    assert lines[6].split() == ["idle", "0.01", "9.5%"]
    assert lines[7].startswith("One step: 0.105 ms on 2 x a GPU, mean of 2")
    assert max(map(len, lines)) <= 100
    page = profile._repr_html_()
    assert page.count("<tr>") == 1 + len(profile.rows)
    assert "<td>quantization</td>" in page
    assert profile.to_markdown().splitlines()[1].startswith("| --- | --- | ---: |")
    known = json.loads(profile.to_json())
    assert known["rows"][0]["product"]["path"] == "up"
    assert known["seconds"] == profile.seconds


def loss(params, x):
    h = jnp.tanh(x @ params["up"])
    return jnp.mean((h @ params["down"]) ** 2)


def train(params, x):
    value, grads = jax.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def arguments():
    up, down, x = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(D, 2 * D), (2 * D, D), (256, D)])
    )
    return {"up": up, "down": down}, x


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(_measure, "_is_on_gpu", lambda: False)
    backend = jax.default_backend()
    said = rf"train\)\.profile measures .* got the backend '{backend}'.*\.report"
    with pytest.raises(RuntimeError, match=said):
        fp8_transform(train).profile(*arguments())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Everything but the kernels' times: one kernel for each product in the program."""
    seen = []
    monkeypatch.setattr(_measure, "_is_on_gpu", lambda: True)

    def one_each(hlo):
        seen.append(origins(hlo))
        return seen[-1]

    def events(folder):
        del folder
        ops = [op for op, origin in seen[-1].by_op.items() if origin.multiplies]
        return [event("dot", op, 10 * i, 10) for i, op in enumerate(ops)]

    monkeypatch.setattr(_measure, "origins", one_each)
    monkeypatch.setattr(_measure, "_events", events)
    return seen


def test_nothing_is_run_for_shapes(as_on_a_gpu):
    del as_on_a_gpu
    shapes = jax.eval_shape(arguments)
    with pytest.raises(
        ValueError, match=r"takes arrays, got Shape.* argument\[0\]\['down"
    ):
        fp8_transform(train).profile(*shapes)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_products_have_times_and_donated_arrays_stay(as_on_a_gpu, jit):
    params, x = arguments()
    donating = fp8_transform(jit(train), donate_argnums=0)
    profile = donating.profile(params, x)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    report = donating.report(params, x)
    assert tuple(r.product for r in profile.rows if r.product) == report.rows
    # XLA:CPU multiplies codes by products of its own, each within the product's call.
    assert all(r.seconds > 0 for r in profile.rows if r.product)
    assert {o.row for o in as_on_a_gpu[-1].by_op.values()} == {
        None,
        *range(len(report.rows)),
    }
    # The function itself is what it was.
    updated, _ = donating(params, x)
    assert updated["up"].shape == (D, 2 * D)


def test_static_arguments_modules_and_names_of_arguments_are_a_call_s(as_on_a_gpu):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(D, D, rngs=nnx.Rngs(0))
    before = model.kernel[...]

    def train(model, *, x, scale):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2) * scale)(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - g, nnx.state(model), grads))
        return value

    step = fp8_transform(nnx.jit(train, donate_argnums=0), static_argnames="scale")
    profile = step.profile(model, x=jnp.ones((256, D)), scale=2.0)
    roles = [r.product.role for r in profile.rows if r.product and r.seconds]
    assert roles == ["fprop", "wgrad"]
    assert as_on_a_gpu
    assert model.kernel[...] is before
    assert not before.is_deleted()


def test_marks_change_no_number():
    args = arguments()
    step = fp8_transform(train)
    _, call, _ = step._prepared(args, {})
    marked = step._step._jitted(tags=True)(call[0], *call[1], **call[2])
    plain = step(*args)
    for a, b in zip(jax.tree.leaves(marked), jax.tree.leaves(plain), strict=True):
        assert (a == b).all()


def test_a_program_of_custom_rules_can_be_marked():
    @jax.custom_vjp
    def double(x, w):
        return x @ w

    double.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def forward(params, x):
        return double(jnp.tanh(x @ params["up"]), params["down"])

    step = fp8_transform(forward, custom_rules=["double"])
    args = arguments()
    _, call, _ = step._prepared(args, {})
    marked = step._step._jitted(tags=True)(call[0], *call[1], **call[2])
    assert (marked == step(*args)).all()


@pytest.mark.gpu
def test_on_a_gpu_every_product_of_a_step_has_kernels():
    params, _ = arguments()
    x = jax.random.normal(jax.random.key(3), (4096, D), jnp.bfloat16)
    step = fp8_transform(jax.jit(train, donate_argnums=0))
    profile = step.profile(params, x)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    products = [row for row in profile.rows if row.product]
    assert tuple(r.product for r in products) == step.report(params, x).rows
    assert all(row.count == 1 for row in products), profile
    named = {k.name for k in profile.kernels if k.kind == "product"}
    assert all(name.startswith("fp8jax_gemm") for name in named), named
    assert profile.of("quantization") > 0
    kernels = sum(kernel.seconds for kernel in profile.kernels)
    assert 0 < kernels <= profile.seconds * 1.01
