"""The table of exchanges between devices, from a program written by hand."""

import pytest

from benchmarks import _h100, _hlo, collectives
from tests.benchmarks.running import run

HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main (p: bf16[2000,500]) -> bf16[2000,500] {
  %p = bf16[2000,500]{1,0} parameter(0)
  %s.1 = (bf16[2000,500]{1,0}, bf16[2000,500]{1,0}) all-reduce-start(%p)
  %g = bf16[2000,500]{1,0} custom-call(%p), custom_call_target="mosaic_gpu_v2"
  %f = bf16[2000,500]{1,0} add(%g, %g)
  %d.1 = bf16[2000,500]{1,0} all-reduce-done(%s.1)
  %s.2 = (bf16[2000,500]{1,0}, bf16[2000,500]{1,0}) all-reduce-start(%f)
  %n = bf16[2000,500]{1,0} negate(%d.1)
  %d.2 = bf16[2000,500]{1,0} all-reduce-done(%s.2)
  ROOT %w = (f8e4m3fn[8,4]{1,0}, f8e4m3fn[8,4]{1,0}) all-gather(%n, %d.2)
}
"""


def test_alike_exchanges_share_a_row_with_the_least_overlap():
    head, columns, *rows = collectives.report("dp, plain", _hlo.parse(HLO))
    assert head.startswith("dp, plain: 7.00 MB sent by a device")
    assert columns.split()[:5] == ["exchange", "runs", "MB", "between", "kernels"]
    assert [row.split() for row in rows] == [
        ["all-reduce", "2", "7.00", "1", "0", "bf16[2000,500]"],
        ["all-gather", "1", "0.00", "-", "0", "2xf8e4m3fn[8,4]"],
    ]


def test_machine_that_cannot_compile_is_told_so(monkeypatch):
    def missing(count):
        raise RuntimeError("cannot compile")

    monkeypatch.setattr(_h100, "devices", missing)
    with pytest.raises(SystemExit, match="cannot compile"):
        run(monkeypatch, collectives)
