"""A whole train step compiled for one H100 does nothing twice and copies no weight."""

import collections

import pytest

from benchmarks import _hlo
from benchmarks._llama import Decoder
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
    """Forward: two norms and h. Backward: the same for wgrad, with dgate and dup."""
    decoder = SCANS[1]
    kernels = _hlo.kernels(fp8(decoder).program)
    fused = [kernel for kernel in kernels if "quantize_map" in kernel.source]
    assert sum(kernel.times for kernel in fused) == 6 * decoder.layers
    assert max(len(kernel.operands) for kernel in fused) == 3
