"""A whole train step compiled for one H100 does nothing twice and copies no weight."""

import collections
import functools
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fp8jax
from benchmarks import _h100, _hlo, batched
from benchmarks._llama import SHAPES, Decoder
from fp8jax.transform.profile._events import Event
from fp8jax.transform.profile._origins import origins
from fp8jax.transform.profile._profile import profile_of
from tests.compiled.programs import fp8, plain, products

pytestmark = pytest.mark.compiled

SCANS = [Decoder(remat=remat) for remat in ("none", "dots", "full")]
# Unrolled layers take long to compile.
UNROLLED = [Decoder(form=form, layers=2) for form in ("unrolled", "list")]


def name(decoder):
    return f"{decoder.form}-{decoder.remat}"


every_form = pytest.mark.parametrize("decoder", SCANS + UNROLLED, ids=name)
beside_plain = pytest.mark.parametrize("decoder", [SCANS[1], *UNROLLED], ids=name)


@every_form
def test_each_fp8_product_of_the_report_is_one_kernel_and_runs_once(decoder):
    rows, kernels = products(decoder)
    assert rows
    assert kernels


@every_form
def test_no_kernel_is_cloned(decoder):
    assert _hlo.clones(fp8(decoder).program) == []


@every_form
def test_xla_itself_computes_nothing_in_fp8(decoder):
    assert _hlo.emulated(fp8(decoder).program) == []


@beside_plain
def test_no_update_of_a_weight_transposes_where_the_plain_one_does_not(decoder):
    ours, theirs = (
        [run.instruction.result for run in _hlo.transposed_weights(program)]
        for program in (fp8(decoder).program, plain(decoder))
    )
    assert len(ours) <= len(theirs), collections.Counter(ours)


@beside_plain
def test_no_weight_or_moment_is_copied_where_the_plain_step_does_not(decoder):
    ours, theirs = (
        [run.instruction.result for run in _hlo.copied_weights(program)]
        for program in (fp8(decoder).program, plain(decoder))
    )
    assert len(ours) <= len(theirs), collections.Counter(ours)


@pytest.mark.parametrize("decoder", SCANS[1:], ids=name)
def test_backward_scans_read_slices_of_stacks_where_they_lie(decoder):
    """But for one that XLA's own attention reads in another layout."""
    ours, theirs = (
        _hlo.copied_slices(program)
        for program in (fp8(decoder).program, plain(decoder))
    )
    assert len({run.instruction.name for run in ours}) <= 1
    assert len(ours) < len(theirs)


def test_norms_and_swiglu_are_computed_where_they_are_quantized():
    """Forward: two norms and h. Backward: the same for wgrad, with dgate and dup.

    And once a step, before the scans, the casts of the stacks of weights.
    """
    decoder = SCANS[1]
    kernels = _hlo.kernels(fp8(decoder).program)
    fused = [kernel for kernel in kernels if "quantize_map" in kernel.source]
    assert sum(kernel.times for kernel in fused) == 6 * decoder.layers + len(SHAPES)
    assert max(len(kernel.operands) for kernel in fused) == 3


@functools.cache
def marked(decoder):
    """The text of a step's program as it is profiled, and the step's report."""
    step, args = decoder.step(_h100.mesh(1))
    transformed = fp8jax.fp8_transform(step)
    call = transformed._step.split(args, {})
    with _h100.as_where_they_are(1):
        report = transformed.report(*args)
        lowered = transformed._step._jitted(tags=True).lower(
            call[0], *call[1], **call[2]
        )
        text = lowered.compile(compiler_options=_h100.OPTIONS).as_text()
    return text, report


def test_profiles_tell_each_product_s_operations_apart():
    text, report = marked(SCANS[1])
    found = origins(text).by_op
    multiplied = collections.Counter(o.row for o in found.values() if o.multiplies)
    rows = dict(enumerate(report.rows))
    assert all(multiplied[i] > 0 for i in rows), multiplied
    # A call in a fusion and the fusion around it are two operations.
    ours = {i: multiplied[i] for i, row in rows.items() if row.status == "fp8"}
    assert max(ours.values()) <= 2, ours


def test_profiles_count_each_product_as_often_as_the_report():
    """Of what a profiler would see: XLA names the operation of kernels in fusions."""
    text, report = marked(SCANS[1])
    seen = []
    for run in _hlo.runs(_hlo.parse(text)):
        if run.instruction.is_mosaic:
            *_, kernel = re.findall(r"\bfp8jax_(?!row_)\w+", run.instruction.source)
            op = run.launch.name if run.launch is not run.instruction else ""
            seen += [(f"{kernel}_mosaic_gpu_kernel", op)] * run.times
    assert {bool(op) for _, op in seen} == {True, False}
    step = [Event("0", name, op, 10.0 * i, 5.0) for i, (name, op) in enumerate(seen)]
    profile = profile_of([step] * 3, origins(text), report, "H100")
    products = [(r.count, r.product) for r in profile.rows if r.product]
    ours = [(count, row) for count, row in products if row.status == "fp8"]
    assert ours
    assert [count for count, _ in ours] == [row.count for _, row in ours]
    assert profile.of("other GEMMs") == 0


@pytest.mark.parametrize("form", batched.FORMS)
def test_batched_products_move_no_codes_and_cast_no_weight(form):
    """Of one shape each: a dimension tells casts of weights from activations."""
    text = batched_step(form)
    program = _hlo.parse(text)
    kernels = _hlo.kernels(program)
    products = [kernel for kernel in kernels if kernel.is_product]
    # Three of each weight, but for the gradient of x, which nobody asks for.
    assert sum(kernel.times for kernel in products) == 3 * 3 - 2
    moved = re.compile(r"= f8e4m3fn\[[\d,]+\]\S* (copy|transpose|concatenate|pad)\(")
    assert moved.findall(text) == []
    weights = re.compile(r"= bf16\[4,(512,768|768,512)\]\S* convert\(")
    assert weights.findall(text) == []


def batched_step(form):
    """What XLA makes of a step of four experts, of 256 rows each."""
    shapes = jax.eval_shape(lambda: batched._arrays(batched.Experts(4, 512, 768), 256))
    sharding = NamedSharding(_h100.mesh(1), PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    step = functools.partial(batched._step, batched._MLPS[form])
    return _h100.compiled(fp8jax.fp8_transform(jax.jit(step)), *args)
