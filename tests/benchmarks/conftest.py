"""What a benchmark needs to run where no GPU is."""

import time

import jax
import pytest

from benchmarks import _contenders, _harness
from fp8jax.kernels import xla


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """No GPU, no torch: XLA's GEMM, one call by wall clock, results in tmp_path."""

    def clock(fn, *args, iterations=0):
        def run():
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            return [(time.perf_counter() - start) * 1e6]

        return run

    monkeypatch.setattr(_harness, "kernel_clock", clock)
    monkeypatch.setattr(_harness, "kernel_us", lambda *a, **kw: clock(*a)()[0])
    monkeypatch.setattr(_harness, "_AHEAD_LOOPS", 1)
    monkeypatch.setattr(_harness, "_AHEAD_BYTES", 1 << 10)
    monkeypatch.setattr(_harness, "HAS_TORCH", False)
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(_contenders.mosaic_gpu, "gemm", xla.gemm)
    return tmp_path
