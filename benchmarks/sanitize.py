"""Are the kernels free of bad accesses and races? compute-sanitizer on small shapes.

    python -m benchmarks.sanitize [--tools memcheck racecheck synccheck]

Runs every GEMM config, GEMMs of groups, the quantizers and their edges under each tool,
compares the results, prints versions and each tool's last lines, and fails if one found
anything.
"""

import argparse
import functools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _contenders
from fp8jax.kernels import mosaic_gpu, xla
from fp8jax.testing import every_gemm_config

TOOLS = ("memcheck", "racecheck", "synccheck")
LINES = 4  # Of a tool's output that are shown where it found nothing.
QUANTIZED: dict[str, Any] = {"dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0}
Result = tuple[str, Any, Any]  # Name, what a kernel gave, what it should give.
# As for groups of more rows than there are here.
CLUSTERS = mosaic_gpu.GemmConfig(
    128, 128, "m", chunks=2, accumulators=2, stages=3, cluster=2
)
# Ragged and whole, fewer and more rows than a block.
SHAPES = [(1, 64, 128), (65, 96, 300), (136, 160, 384), (264, 320, 256)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--minutes", type=float, default=9, help="limit of each tool")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run_kernels()
        return
    sanitizer = _sanitizer()
    if sanitizer is None:
        parser.error("finds no compute-sanitizer: put CUDA's bin folder on PATH.")
    print(_output([sanitizer, "--version"])[1].strip())
    failed = [t for t in options.tools if not _clean(sanitizer, t, options.minutes)]
    if failed:
        sys.exit(f"not clean: {', '.join(failed)}")


def run_kernels() -> None:
    """Every kernel once, on the GPU; raises where one gives wrong numbers."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    launches = 0
    for shape in SHAPES:
        m, n, k = shape
        rng = np.random.default_rng(m + n + k)
        x, w = (rng.standard_normal((side, k), np.float32) for side in (m, n))
        results = (
            *_quantizers(x),
            *_gemms(x, w, every_config=shape == SHAPES[-1]),
            *_gemm_swiglu(x, w),
            *_grouped_gemms(x, w),
        )
        for name, out, expected in results:
            launches += 1
            for part, reference in zip(
                jax.tree.leaves(out), jax.tree.leaves(expected), strict=True
            ):
                # Sums were made in another order, from which a code of a fused kernel
                # may lie on the other side: a step, 2^-3 of it.
                np.testing.assert_allclose(
                    np.asarray(part).astype(np.float32),
                    np.asarray(reference).astype(np.float32),
                    rtol=0.13,
                    atol=1e-2,
                    err_msg=f"{name} of {m}x{n}x{k}",
                )
    print(f"{launches} results of Mosaic kernels are right")


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
            expected = getattr(xla, name)(
                *map(jnp.asarray, arrays), **static, **QUANTIZED
            )
        yield f"{name} {static}", out, expected


def _gemms(x: np.ndarray, w: np.ndarray, *, every_config: bool) -> Iterator[Result]:
    for name, (lhs_tile, rhs_tile) in _contenders.TILES.items():
        tiles: dict[str, Any] = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
        with jax.default_device(jax.devices("cpu")[0]):
            lhs, lhs_scale = xla.quantize(jnp.asarray(x), tile=lhs_tile, **QUANTIZED)
            rhs, rhs_scale = xla.quantize(jnp.asarray(w), tile=rhs_tile, **QUANTIZED)
            operands = lhs, lhs_scale, rhs, rhs_scale
            expected = xla.gemm(*operands, out_dtype=jnp.float32, **tiles)
        operands = jax.device_put(operands, jax.devices()[0])
        ones = jnp.ones(expected.shape, jnp.float32)
        out = mosaic_gpu.gemm(
            *operands, accumulate=ones, out_dtype=jnp.float32, **tiles
        )
        yield f"{name} accumulated", out, expected + 1
        kind = "1d1d" if name == "1d1d" else "1d2d"  # 2d1d is 1d2d, transposed.
        for out_dtype in ("bfloat16", "float32"):
            configs = every_gemm_config(kind, out_dtype) if every_config else [None]
            for config in configs:
                out = mosaic_gpu.multiply(
                    *operands, **tiles, out_dtype=out_dtype, config=config
                )
                yield f"{name} with {config} to {out_dtype}", out, expected


def _gemm_swiglu(x: np.ndarray, w: np.ndarray) -> Iterator[Result]:
    """Of up to 64 rows of x and a whole tile of columns: in one launch."""
    lhs_tile, rhs_tile = _contenders.TILES["1d2d"]
    with jax.default_device(jax.devices("cpu")[0]):
        gate = jnp.asarray(np.resize(w, (128, w.shape[1])))
        rows = jnp.asarray(x[:64])
        matrices = ((rows, lhs_tile), (gate, rhs_tile), (-gate, rhs_tile))
        operands = [
            array
            for matrix, tile in matrices
            for array in xla.quantize(matrix, tile=tile, **QUANTIZED)
        ]
        how: dict[str, Any] = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile, **QUANTIZED}
        expected = xla.gemm_swiglu(*operands, between=jnp.bfloat16, **how)
    operands = jax.device_put(operands, jax.devices()[0])
    out = mosaic_gpu.gemm_swiglu(*operands, between=jnp.bfloat16, **how)
    yield "gemm_swiglu", out, expected


def _grouped_gemms(x: np.ndarray, w: np.ndarray) -> Iterator[Result]:
    """Rows of x in groups: empty ones, one of one row, and rows that are left over."""
    m = len(x)
    sizes = (m // 2, 0, min(1, m // 4), m // 3, 0)
    kinds = {"rows": _contenders.TILES["1d2d"], **_contenders.TILES}
    del kinds["1d2d"]  # Of columns: 2d1d with the operands exchanged.
    for name, (lhs_tile, rhs_tile) in kinds.items():
        op = "grouped_gemm" if name == "rows" else "grouped_gemm_k"
        tiles: dict[str, Any] = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
        with jax.default_device(jax.devices("cpu")[0]):
            group_sizes = jnp.asarray(sizes, jnp.int32)
            if name == "rows":
                lhs = xla.quantize(jnp.asarray(x), tile=lhs_tile, **QUANTIZED)
                stack = [w * (1 + i) for i in range(len(sizes))]
                codes = (
                    xla.quantize(jnp.asarray(one), tile=rhs_tile, **QUANTIZED)
                    for one in stack
                )
                rhs = tuple(map(jnp.stack, zip(*codes, strict=True)))
            else:
                lhs, rhs = (
                    xla.quantize_grouped(
                        jnp.asarray(one), group_sizes, tile=None, tile_t=t, **QUANTIZED
                    )[1]
                    for one, t in ((x, lhs_tile), (x[:, ::-1], rhs_tile))
                )
                assert lhs is not None
                assert rhs is not None
            operands = *lhs, *rhs, group_sizes
            expected = getattr(xla, op)(*operands, out_dtype=jnp.float32, **tiles)
        operands = jax.device_put(operands, jax.devices()[0])
        run = functools.partial(getattr(mosaic_gpu, op), *operands, **tiles)
        for out_dtype in ("bfloat16", "float32"):
            yield (
                f"{op} {name} {sizes} to {out_dtype}",
                run(out_dtype=out_dtype),
                expected,
            )
        if name == "rows" and x.shape[1] > mosaic_gpu.CHUNK:  # Two chunks a stage.
            out = mosaic_gpu.multiply_rows(
                *operands, out_dtype=jnp.float32, config=CLUSTERS
            )
            yield f"{op} in {CLUSTERS}", out, expected
        if name != "rows":
            ones = jnp.ones(expected.shape, jnp.float32)
            out = run(accumulate=ones, out_dtype=jnp.float32)
            yield f"{op} {name} {sizes} accumulated", out, expected + 1


def _clean(sanitizer: str, tool: str, minutes: float) -> bool:
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "benchmarks.sanitize", "--inside"]
    print(f"== {tool}", flush=True)
    code, text = _output(command, minutes)
    summary = text.strip().splitlines()
    print(*(summary[-LINES:] if code == 0 else summary[-60:]), sep="\n", flush=True)
    return code == 0


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
