"""A decoder's step compiled for H100s, once a process: it takes half a minute."""

import functools
from typing import NamedTuple

import fp8jax
from benchmarks import _h100, _hlo
from benchmarks._llama import SHAPES, Decoder
from fp8jax.transform import Report, Row


class Compiled(NamedTuple):
    """What XLA made of a step, and what `fp8_transform` says of it."""

    program: _hlo.Program
    report: Report


def devices(decoder: Decoder) -> int:
    return 1 if decoder.parallel == "none" else 8


@functools.cache
def plain(decoder: Decoder) -> _hlo.Program:
    """The step in BF16."""
    step, args = decoder.step(_h100.mesh(devices(decoder)))
    return _hlo.parse(_h100.compiled(step, *args))


@functools.cache
def fp8(decoder: Decoder) -> Compiled:
    """The step under `fp8_transform`."""
    step, args = decoder.step(_h100.mesh(devices(decoder)))
    step = fp8jax.fp8_transform(step)
    with _h100.as_where_they_are(devices(decoder)):
        report = step.report(*args)
    return Compiled(_hlo.parse(_h100.compiled(step, *args)), report)


def products(decoder: Decoder) -> tuple[list[Row], list[_hlo.Kernel]]:
    """The report's rows in FP8 and the program's kernels, as many runs of each."""
    program, report = fp8(decoder)
    rows = [row for row in report.rows if row.status == "fp8"]
    # Every weight's fprop, dgrad and wgrad, or the test would be about nothing.
    assert sum(row.count for row in rows) >= 3 * len(SHAPES) * decoder.layers
    assert {row.kernel for row in rows} == {"mosaic_gpu"}
    kernels = [kernel for kernel in _hlo.kernels(program) if kernel.is_product]
    assert sum(kernel.times for kernel in kernels) == sum(row.count for row in rows)
    return rows, kernels
