"""What eight H100s send one another in a train step that is sharded automatically."""

import math

import pytest

from benchmarks import _hlo
from benchmarks._llama import SHAPES, VOCABULARY, D, Decoder
from tests.compiled.programs import plain

pytestmark = pytest.mark.compiled

DP, FSDP, TP = (Decoder(parallel=parallel) for parallel in ("dp", "fsdp", "tp"))
LAYERS = DP.layers * sum(math.prod(shape) for shape in SHAPES.values())
OUTER = 2 * VOCABULARY * D  # Embedding and head.


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
