"""Scanned, rematted decoders: what becomes of their products, in every framework."""

import collections

import pytest

from benchmarks._decoders import CASES, LAYERS
from fp8jax.transform import fp8_transform

# The intended roles of each layer's products, each once in a loop over the layers. The
# last product of a block has no consumer in the backward pass: nothing recomputes it.
INTENDED = {
    "qkv": ("fprop", "recompute", "dgrad", "wgrad"),
    "out": ("fprop", "recompute", "dgrad", "wgrad"),
    "up": ("fprop", "recompute", "dgrad", "wgrad"),
    "down": ("fprop", "dgrad", "wgrad"),
}
# Scores and their use: forward, recomputed, and two gradients of each.
ATTENTION = 2 * (1 + 1 + 2)


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("framework", CASES)
def test_every_product_of_a_scanned_rematted_decoder_is_as_intended(framework):
    if framework == "equinox":
        pytest.importorskip("equinox")
    case = CASES[framework]()
    report = fp8_transform(case.step).report(*case.args)
    fp8 = [r for r in report.rows if r.status == "fp8"]
    wanted = {(case.path.format(n), role) for n in INTENDED for role in INTENDED[n]}
    assert collections.Counter((r.path, r.role) for r in fp8) == collections.Counter(
        wanted
    ), str(report)
    assert {r.count for r in fp8} == {LAYERS}
    skipped = [r for r in report.rows if r.status == "skipped"]
    head = [r for r in skipped if r.path == case.head]
    assert sorted(r.role for r in head) == ["dgrad", "fprop", "wgrad"]
    others = [r for r in skipped if r not in head]
    assert {r.role for r in others} == {"other"}
    assert len(others) == ATTENTION
    assert report.fraction > 0.8
