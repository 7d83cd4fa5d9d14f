"""Are the kernels free of bad accesses and races? compute-sanitizer on small shapes.

    python -m benchmarks.sanitize [--tools memcheck racecheck synccheck] [--jobs 4]

Runs every GEMM config with one output dtype, GEMMs of groups, the quantizers and their
edges under each tool, compares the results, prints versions and each tool's last lines,
and fails if one found anything. What a tool checks is split among processes: they
compile most of the time.
"""

import argparse
import concurrent.futures
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _contenders
from fp8jax.kernels import mosaic_gpu, xla
from fp8jax.testing import every_gemm_config

TOOLS = ("memcheck", "racecheck", "synccheck")
LINES = 4  # Of a tool's output that are shown where it found nothing.
QUANTIZED: dict[str, Any] = {"dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0}
PARTS = 8  # Processes of each tool.
# With which output every config of a kind runs; with the other one, the computed one.
EVERY = {"1d2d": "bfloat16", "1d1d": "float32", "2d1d": "float32"}
OTHER = {"bfloat16": "float32", "float32": "bfloat16"}
# As for groups of more rows than there are here.
CLUSTERS = mosaic_gpu.GemmConfig(
    128, 128, "m", chunks=2, accumulators=2, stages=3, cluster=2
)
# Ragged and whole, fewer and more rows than a block.
SHAPES = [(1, 64, 128), (65, 96, 300), (136, 160, 384), (264, 320, 256)]


class Result(NamedTuple):
    """What a kernel gave and what it should give, pytrees, and how far they may lie."""

    name: str
    out: Any
    expected: Any
    atol: float = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--minutes", type=float, default=9, help="limit of each one")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        run_kernels(options.inside)
        return
    sanitizer = _sanitizer()
    if sanitizer is None:
        parser.error("finds no compute-sanitizer: put CUDA's bin folder on PATH.")
    print(_output([sanitizer, "--version"])[1].strip())
    runs = [(tool, part) for tool in options.tools for part in range(PARTS)]

    def sanitized(run: tuple[str, int]) -> tuple[int, str]:
        tool, part = run
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
        # Not ptxas, which XLA starts: with it three of eight processes hung.
        command += ["--target-processes", "application-only"]
        command += [sys.executable, "-m", "benchmarks.sanitize", "--inside", str(part)]
        return _output(command, options.minutes)

    failed = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for (tool, part), (code, text) in zip(
            runs, pool.map(sanitized, runs), strict=True
        ):
            print(f"== {tool}, part {part + 1} of {PARTS}")
            lines = text.strip().splitlines()
            print(*lines[-LINES if code == 0 else -60 :], sep="\n", flush=True)
            if code:
                failed.append(tool)
    if failed:
        sys.exit(f"not clean: {', '.join(dict.fromkeys(failed))}")


def run_kernels(part: int) -> None:
    """A part of the kernels once, on the GPU; raises where one gives wrong numbers."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    # Those of the last shape are the most: each to another part.
    units = [unit for shape in reversed(SHAPES) for unit in _units(*shape)]
    launches, start = 0, time.monotonic()
    for unit in units[part::PARTS]:
        for result in unit():
            launches += 1
            print(f"{time.monotonic() - start:.0f} s, {result.name}", flush=True)
            for leaf, reference in zip(
                jax.tree.leaves(result.out),
                jax.tree.leaves(result.expected),
                strict=True,
            ):
                # Sums were made in another order, from which a code of a fused kernel
                # may lie on the other side: a step, 2^-3 of it.
                np.testing.assert_allclose(
                    np.asarray(leaf).astype(np.float32),
                    np.asarray(reference).astype(np.float32),
                    rtol=0.13,
                    atol=result.atol,
                    err_msg=result.name,
                )
    print(f"{launches} results of Mosaic kernels are right")


def _units(m: int, n: int, k: int) -> list[Callable[[], Iterator[Result]]]:
    """What can run by itself, of one shape."""
    rng = np.random.default_rng(m + n + k)
    x, w = (rng.standard_normal((side, k), np.float32) for side in (m, n))
    is_last = (m, n, k) == SHAPES[-1]
    gemms = [
        functools.partial(_gemms, x, w, kind, out_dtype, every_config=is_last)
        for kind, out_dtype in EVERY.items()
    ] + [
        functools.partial(_gemms, x, w, kind, OTHER[out_dtype], every_config=False)
        for kind, out_dtype in EVERY.items()
    ]
    grouped = [
        functools.partial(_grouped_gemms, x, w, kind) for kind in _contenders.TILES
    ]
    return [
        *gemms,
        *grouped,
        functools.partial(_quantizers, x),
        functools.partial(_gemm_swiglu, x, w),
    ]


def _tolerance(expected: jax.Array, k: int) -> float:
    """A tensor core adds 32 products at once, with 13 bits below the largest."""
    return -(-k // 32) * 2**-13 * float(np.abs(expected).max())


def _by_xla(name: str, *arrays: jax.typing.ArrayLike, **static: Any) -> Any:
    """An op's oracle, compiled once for its shapes: eagerly, each of its steps is."""
    return jax.jit(getattr(xla, name), static_argnames=tuple(static))(*arrays, **static)


def _quantizers(x: np.ndarray) -> Iterator[Result]:
    row, column, block = (1, 128), (128, 1), (128, 128)
    y, z = x[::-1], x[:, ::-1]
    calls: list[tuple[str, tuple[np.ndarray, ...], dict[str, Any]]] = [
        *(("quantize", (x,), {"tile": tile}) for tile in (row, column, block)),
        ("quantize_both", (x,), {"tile": row, "tile_t": row}),
        ("quantize_both", (x,), {"tile": block, "tile_t": block}),
        ("quantize_swiglu", (x, y), {"tile": row, "tile_t": row}),
        ("quantize_swiglu_gradient", (x, y, z), {"tile": row, "tile_t": row}),
        ("quantize_rms_norm", (x, x[0]), {"tile": row, "epsilon": 1e-6}),
        ("quantize_add_rms_norm", (x, y, x[0]), {"tile": row, "epsilon": 1e-6}),
    ]
    for name, arrays, static in calls:
        out = getattr(mosaic_gpu, name)(
            *map(jnp.asarray, arrays), **static, **QUANTIZED
        )
        with jax.default_device(jax.devices("cpu")[0]):
            expected = _by_xla(name, *arrays, **static, **QUANTIZED)
        yield Result(f"{name} {static} of {x.shape}", out, expected)


def _gemms(
    x: np.ndarray, w: np.ndarray, kind: str, out_dtype: str, *, every_config: bool
) -> Iterator[Result]:
    lhs_tile, rhs_tile = _contenders.TILES[kind]
    tiles: dict[str, Any] = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
    with jax.default_device(jax.devices("cpu")[0]):
        lhs = _by_xla("quantize", x, tile=lhs_tile, **QUANTIZED)
        rhs = _by_xla("quantize", w, tile=rhs_tile, **QUANTIZED)
        operands = *lhs, *rhs
        expected = _by_xla("gemm", *operands, out_dtype=jnp.float32, **tiles)
    operands = jax.device_put(operands, jax.devices()[0])
    atol = _tolerance(expected, x.shape[1])
    name = f"{kind} of {x.shape} by {w.shape} to {out_dtype}"
    if out_dtype == "float32":
        ones = jnp.ones(expected.shape, jnp.float32)
        out = mosaic_gpu.gemm(*operands, accumulate=ones, out_dtype=out_dtype, **tiles)
        yield Result(f"{name}, accumulated", out, expected + 1, atol)
    of_kind = "1d1d" if kind == "1d1d" else "1d2d"  # 2d1d is 1d2d, transposed.
    for config in every_gemm_config(of_kind, out_dtype) if every_config else [None]:
        out = mosaic_gpu.multiply(
            *operands, **tiles, out_dtype=out_dtype, config=config
        )
        yield Result(f"{name} with {config}", out, expected, atol)


def _gemm_swiglu(x: np.ndarray, w: np.ndarray) -> Iterator[Result]:
    """Of up to 64 rows of x and a whole tile of columns: in one launch."""
    lhs_tile, rhs_tile = _contenders.TILES["1d2d"]
    with jax.default_device(jax.devices("cpu")[0]):
        gate = np.resize(w, (128, w.shape[1]))
        rows = x[:64]
        matrices = ((rows, lhs_tile), (gate, rhs_tile), (-gate, rhs_tile))
        operands = [
            array
            for matrix, tile in matrices
            for array in _by_xla("quantize", matrix, tile=tile, **QUANTIZED)
        ]
        how: dict[str, Any] = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile, **QUANTIZED}
        expected = _by_xla("gemm_swiglu", *operands, between=jnp.bfloat16, **how)
    operands = jax.device_put(operands, jax.devices()[0])
    out = mosaic_gpu.gemm_swiglu(*operands, between=jnp.bfloat16, **how)
    yield Result(f"gemm_swiglu of {rows.shape}", out, expected)


def _grouped_gemms(x: np.ndarray, w: np.ndarray, kind: str) -> Iterator[Result]:
    """Rows of x in groups: empty ones, one of one row, and rows that are left over."""
    m, k = x.shape
    sizes = (m // 2, 0, min(1, m // 4), m // 3, 0)
    lhs_tile, rhs_tile = _contenders.TILES[kind]
    in_rows = kind == "1d2d"  # Of columns it is 2d1d with the operands exchanged.
    op = "grouped_gemm" if in_rows else "grouped_gemm_k"
    tiles: dict[str, Any] = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
    with jax.default_device(jax.devices("cpu")[0]):
        group_sizes = jnp.asarray(sizes, jnp.int32)
        if in_rows:
            lhs = _by_xla("quantize", x, tile=lhs_tile, **QUANTIZED)
            stack = [w * np.float32(1 + i) for i in range(len(sizes))]
            codes = (
                _by_xla("quantize", one, tile=rhs_tile, **QUANTIZED) for one in stack
            )
            rhs = tuple(map(jnp.stack, zip(*codes, strict=True)))
        else:
            lhs, rhs = (
                _by_xla(
                    "quantize_grouped",
                    *(one, group_sizes),
                    **{"tile": None, "tile_t": t, **QUANTIZED},
                )[1]
                for one, t in ((x, lhs_tile), (x[:, ::-1], rhs_tile))
            )
            assert lhs is not None
            assert rhs is not None
        operands = *lhs, *rhs, group_sizes
        expected = _by_xla(op, *operands, out_dtype=jnp.float32, **tiles)
    operands = jax.device_put(operands, jax.devices()[0])
    atol = _tolerance(expected, k if in_rows else m)
    name = f"{op} {kind} of {x.shape} in {sizes}"
    run = functools.partial(getattr(mosaic_gpu, op), *operands, **tiles)
    for out_dtype in ("bfloat16", "float32"):
        out = run(out_dtype=out_dtype)
        yield Result(f"{name} to {out_dtype}", out, expected, atol)
    if in_rows and k > mosaic_gpu.CHUNK:  # Two chunks a stage.
        out = mosaic_gpu.multiply_rows(
            *operands, out_dtype=jnp.float32, config=CLUSTERS
        )
        yield Result(f"{name} with {CLUSTERS}", out, expected, atol)
    if not in_rows:
        ones = jnp.ones(expected.shape, jnp.float32)
        out = run(accumulate=ones, out_dtype=jnp.float32)
        yield Result(f"{name}, accumulated", out, expected + 1, atol)


def _output(command: list[str], minutes: float = 1) -> tuple[int, str]:
    environment = os.environ | {
        # Else one allocation covers everything, and no access is out of bounds.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        # Launches that are not inside CUDA graphs can be told apart.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_enable_command_buffer=",
    }
    try:
        run = subprocess.run(
            command,
            env=environment,
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60 * minutes,
        )
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return 124, f"{text}\nstopped after {minutes} minutes"
    return run.returncode, run.stdout


def _sanitizer() -> str | None:
    cuda = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = os.pathsep.join((os.environ.get("PATH", ""), str(cuda)))
    return shutil.which("compute-sanitizer", path=path)


if __name__ == "__main__":
    main()
