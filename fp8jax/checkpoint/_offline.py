"""Whole checkpoints to FP8 and back, however large."""

import functools
import math
import os
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._ahead import Work
from fp8jax.checkpoint._band import quantize_band
from fp8jax.checkpoint._config import quantization_config
from fp8jax.checkpoint._dtypes import E8M0, scale_to_e8m0
from fp8jax.checkpoint._families import is_matrix, modules_kept
from fp8jax.checkpoint._quantized import check_unquantized, whole
from fp8jax.checkpoint._reader import Reader
from fp8jax.checkpoint._rules import TILE, WeightRules, reasons_kept
from fp8jax.checkpoint._save import MAX_SHARD_BYTES, SCALE_SUFFIX
from fp8jax.checkpoint._stream import (
    Job,
    Outcome,
    Progress,
    bands,
    copy_work,
    rewrite,
)
from fp8jax.checkpoint._write import ShardWriter, Specs, nbytes
from fp8jax.quant import QTensor, QuantSpec

_E4M3 = np.dtype(jnp.float8_e4m3fn)


def quantize_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    rules: WeightRules | None = None,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda nbytes: None,
) -> list[Outcome]:
    """Writes the checkpoint at `source` with FP8 weights, the same on every machine.

    Codes and scales are `quantize`'s by IEEE arithmetic: its bits with scales of ue8m0;
    with float32 ones XLA's division may move codes of what lies at a tie by a step.

    Weights are read, quantized and written in bands of rows: memory does not grow with
    the model. Other files of the source folder are copied. A run that was killed is
    taken up by the next one with the same arguments.

    Args:
        source: as in `Reader`; weights are bfloat16, float16 or float32.
        target: a folder that is not there yet.
        rules: which weights, and with which scales.
        dry_run: write nothing, and say what would be written.
        overwrite: replace what is at `target`, once all is written.
        max_shard_bytes: of a file.
        progress: is called with the number of bytes of `source` that were done since.

    Returns:
        An Outcome for each tensor.

    Raises:
        CheckpointError: As `Reader` does.
        ValueError: If the checkpoint is quantized already, by whatever method; if the
            rules choose no weight; or if `target` is there, is or holds the source, or
            is being written by another run.
        OSError: If a file cannot be read or written.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    reader = Reader(source)
    rules = WeightRules() if rules is None else rules
    notes = _notes(reader, rules)
    jobs, outcomes = [], []
    for name, weight in reader.items():
        stored, note = weight.stored, notes[name]
        specs: Specs = {name: jax.ShapeDtypeStruct(stored.shape, stored.dtype)}
        work = functools.partial(copy_work, name=name, note=note or "")
        if note is None:
            if name + SCALE_SUFFIX in reader:
                raise ValueError(
                    f"quantize_checkpoint writes scales to {name + SCALE_SUFFIX!r}, "
                    f"which is a tensor of {stored.path} already."
                )
            specs = _fp8_specs(name, stored.shape, rules)
            work = functools.partial(_quantize_work, name=name, spec=rules.spec)
        jobs.append(Job(name, specs, work))
        size = sum(map(nbytes, specs.values()))
        outcomes.append(Outcome(name, note or "", stored.nbytes, size))
    if dry_run:
        return outcomes
    if None not in notes.values():
        reasons = sorted({note for note in notes.values() if note})
        raise ValueError(
            f"quantize_checkpoint finds no weight of {reader.path} that the rules "
            f"choose: its {len(notes)} tensors stay, because "
            f"{', '.join(reasons[:8]) or 'there are none'}."
        )
    kept = (n for n, note in notes.items() if note is not None)
    kept = (n for n in kept if is_matrix(n, len(reader[n].stored.shape)))
    modules = modules_kept(kept, reader, reader.config)
    return rewrite(
        reader,
        os.fspath(target),
        jobs,
        quantization_config(_E4M3, TILE, rules.scale, modules),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def dequantize_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    tile: numerics.Tile | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda nbytes: None,
) -> list[Outcome]:
    """Writes the checkpoint at `source` with its FP8 weights as `codes * scale`.

    Args:
        dtype: of those weights. float32 is exact but for the product's rounding.
        tile: as in `Reader`.
        source, target, overwrite, max_shard_bytes, progress: as in
            `quantize_checkpoint`.

    Returns:
        An Outcome for each tensor.

    Raises:
        CheckpointError, ValueError, OSError: As `quantize_checkpoint` does.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(
            "dequantize_checkpoint takes dtype bfloat16, float16 or float32, got "
            f"{dtype!r}."
        )
    reader = Reader(source, tile=tile)
    whole("dequantize_checkpoint", reader)
    if all(weight.scale is None for weight in reader.values()):
        raise ValueError(f"dequantize_checkpoint finds no FP8 weight in {reader.path}.")
    jobs = []
    for name, weight in reader.items():
        stored = weight.stored
        to = stored.dtype if weight.scale is None else np.dtype(jnp.dtype(dtype))
        work = functools.partial(copy_work, name=name, note="not FP8")
        if weight.scale is not None:
            work = functools.partial(_dequantize_work, name=name, dtype=dtype)
        jobs.append(Job(name, {name: jax.ShapeDtypeStruct(stored.shape, to)}, work))
    return rewrite(
        reader,
        os.fspath(target),
        jobs,
        None,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def _notes(reader: Reader, rules: WeightRules) -> dict[str, str | None]:
    """Why each tensor stays as it is; None of those that become FP8."""
    whole("quantize_checkpoint", reader)
    check_unquantized(reader)
    tensors = {n: (w.stored.shape, w.stored.dtype) for n, w in reader.items()}
    return reasons_kept(rules, tensors, reader.config)


def _fp8_specs(name: str, shape: tuple[int, ...], rules: WeightRules) -> Specs:
    scale_dtype = E8M0 if rules.scale == "ue8m0" else np.float32
    return {
        name: jax.ShapeDtypeStruct(shape, _E4M3),
        name + SCALE_SUFFIX: jax.ShapeDtypeStruct(
            numerics.scale_shape(shape, TILE), scale_dtype
        ),
    }


def _quantize_work(
    reader: Reader, writer: ShardWriter, *, name: str, spec: QuantSpec
) -> Work[Outcome]:
    stored = reader[name].stored
    *batch, m, k = stored.shape
    pieces = list(bands(stored.shape, spec.tile))
    scale_shape = numerics.scale_shape((math.prod(batch), m, k), spec.tile)
    scales = np.empty(scale_shape, np.float32)
    sums: list[tuple[float, float]] = [(0.0, 0.0)] * len(pieces)

    def run(i: int) -> int:
        matrix, rows = pieces[i]
        x = take_rows(reader, name, matrix, rows)
        band = quantize_band(x, spec)
        writer.write(name, band.codes, (matrix * m + rows.start) * k)
        first = rows.start // spec.tile[0]
        scales[matrix, first : first + len(band.scale)] = band.scale
        sums[i] = band.error, band.signal
        return x.nbytes

    def finish() -> Outcome:
        whole = scales.reshape(numerics.scale_shape(stored.shape, spec.tile))
        kept = scale_to_e8m0(whole, name) if spec.scale == "pow2" else whole
        writer.write(name + SCALE_SUFFIX, kept)
        # In the order of the bands: the same bits however they ran.
        error, signal = (sum(side) for side in zip(*sums, strict=True))
        size = math.prod(stored.shape) + kept.nbytes
        return Outcome(name, "", stored.nbytes, size, sqnr_of(error, signal))

    return Work((functools.partial(run, i) for i in range(len(pieces))), finish)


def sqnr_of(error: float, signal: float) -> float:
    """dB of two sums of squares; infinite where there is no error, NaN of NaN."""
    if not (math.isfinite(error) and math.isfinite(signal)):
        return math.nan
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize_band(q: QTensor, dtype: str) -> jax.Array:
    return q.dequantize(jnp.dtype(dtype))


def take_rows(reader: Reader, name: str, matrix: int, rows: slice) -> np.ndarray:
    """Rows of one matrix of a tensor `[..., m, k]`, copied: `[rows, k]`."""
    *_, m, k = reader[name].stored.shape
    first = matrix * m
    part = slice((first + rows.start) * k, (first + rows.stop) * k)
    return reader.take(name, part).reshape(-1, k)


def band_values(reader: Reader, name: str, matrix: int, rows: slice, dtype: str):
    """Rows of an FP8 weight as `codes * scale`, a jax.Array `[rows, k]`."""
    weight = reader[name]
    assert weight.tile is not None
    scale = reader.scale(name)
    scale = scale.reshape(-1, *scale.shape[-2:])[matrix]
    tiles = slice(rows.start // weight.tile[0], -(-rows.stop // weight.tile[0]))
    codes = take_rows(reader, name, matrix, rows)
    # On the CPU, whatever else there is; a setting of each thread's own.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        q = QTensor(jax.device_put(codes), jnp.asarray(scale[tiles]), weight.tile)
        return _dequantize_band(q, dtype)


def _dequantize_work(
    reader: Reader, writer: ShardWriter, *, name: str, dtype: str
) -> Work[Outcome]:
    weight = reader[name]
    assert weight.tile is not None
    *_, m, k = weight.stored.shape

    def run(matrix: int, rows: slice) -> int:
        values = np.asarray(band_values(reader, name, matrix, rows, dtype))
        writer.write(name, values, (matrix * m + rows.start) * k)
        return values.size

    pieces = bands(weight.stored.shape, weight.tile)
    size = math.prod(weight.stored.shape) * jnp.dtype(dtype).itemsize
    outcome = Outcome(name, "", weight.nbytes, size)
    return Work((functools.partial(run, *piece) for piece in pieces), lambda: outcome)
