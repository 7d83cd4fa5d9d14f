"""What eight H100s do and send one another in a step that is sharded automatically."""

import math

import pytest

from benchmarks import _hlo
from benchmarks._llama import SHAPES, VOCABULARY, D, Decoder
from tests.compiled.programs import fp8, plain, products

pytestmark = pytest.mark.compiled

DP, FSDP, TP = (Decoder(parallel=parallel) for parallel in ("dp", "fsdp", "tp"))
LAYERS = DP.layers * sum(math.prod(shape) for shape in SHAPES.values())
OUTER = 2 * VOCABULARY * D  # Embedding and head.
# Scales, norms' gains and losses have fewer elements, a weight's shard has more.
SMALL = 1 << 14

each = pytest.mark.parametrize("decoder", [DP, FSDP, TP], ids=["dp", "fsdp", "tp"])


@pytest.mark.parametrize(
    ("decoder", "sent"),
    [
        # Gradients, summed in BF16.
        (DP, 2 * 2 * (LAYERS + OUTER) * 7 / 8),
        # Gathered forward and backward, scattered once; the outer ones gathered once.
        (FSDP, (6 * LAYERS + 4 * OUTER) * 7 / 8),
    ],
    ids=["dp", "fsdp"],
)
def test_plain_step_sends_what_arithmetic_says(decoder, sent):
    found = _hlo.sent(_hlo.collectives(plain(decoder)))
    # Norms' gains, in float32, and the loss come on top.
    assert sent <= found <= 1.01 * sent


@each
def test_each_fp8_product_is_one_kernel_of_an_eighth_on_every_shard(decoder):
    rows, kernels = products(decoder)
    assert 8 * sum(map(multiplications, kernels)) == sum(
        row.count * row.m * row.n * row.k for row in rows
    )


def multiplications(kernel):
    """Of all its runs: mnk is the root of mk nk mn."""
    sizes = [array.size for array in kernel.operands if array.is_fp8]
    (result,) = kernel.results
    return kernel.times * math.isqrt(math.prod(sizes) * result.size)


@each
def test_xla_itself_computes_nothing_in_fp8(decoder):
    assert _hlo.emulated(fp8(decoder).program) == []


@each
def test_no_operand_is_gathered_that_the_plain_step_does_not_gather(decoder):
    ours, theirs = (
        _hlo.gathered(_hlo.collectives(program), at_least=SMALL)
        for program in (fp8(decoder).program, plain(decoder))
    )
    assert ours - theirs == {}


@pytest.mark.parametrize(
    ("decoder", "share"),
    [
        (DP, 1.01),
        # Of 6 bytes for each weight of the layers 4: codes gathered forward and
        # backward, gradients scattered in BF16. Scales are 1/4096 of codes.
        (FSDP, 1.001 * (4 * LAYERS + 4 * OUTER) / (6 * LAYERS + 4 * OUTER)),
        (TP, 1.01),
    ],
    ids=["dp", "fsdp", "tp"],
)
def test_no_more_is_sent_than_by_the_plain_step_and_weights_as_codes(decoder, share):
    ours, theirs = (
        _hlo.sent(_hlo.collectives(program))
        for program in (fp8(decoder).program, plain(decoder))
    )
    assert ours <= share * theirs


# An axis of features may split sequences of 640 within tiles: wgrad is alone there.
@pytest.mark.parametrize("decoder", [DP, FSDP], ids=["dp", "fsdp"])
def test_as_many_quantizations_run_as_on_one_gpu(decoder):
    found, wanted = (
        sum(k.times for k in _hlo.kernels(fp8(x).program) if k.is_quantization)
        for x in (decoder, Decoder())
    )
    assert found == wanted


@each
def test_no_kernel_is_cloned(decoder):
    assert _hlo.clones(fp8(decoder).program) == []


@each
@pytest.mark.parametrize("found", [_hlo.copied_weights, _hlo.transposed_weights])
def test_no_weight_is_copied_or_transposed_where_the_plain_step_does_not(
    decoder, found
):
    ours, theirs = (
        # FSDP turns a shard's codes once a step, to gather them along the contraction.
        [run for run in found(program) if not run.instruction.arrays[0].is_fp8]
        for program in (fp8(decoder).program, plain(decoder))
    )
    assert len(ours) <= len(theirs)
