"""Are the kernels free of bad accesses and races? compute-sanitizer on small shapes.

    python -m benchmarks.sanitize [--tools memcheck racecheck synccheck]

Runs every GEMM config, both quantizers and their edges under each tool, compares the
results, prints versions and each tool's last lines, and fails if one found anything.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
LINES = 4  # Of a tool's output that are shown where it found nothing.
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
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import _contenders
    from fp8jax.kernels import mosaic_gpu, xla
    from fp8jax.testing import every_gemm_config

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}")
    cpu = jax.devices("cpu")[0]
    options = {"dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0}
    launches = 0

    def check(name: str, out: jax.Array, expected: jax.Array) -> None:
        nonlocal launches
        launches += 1
        a, b = (np.asarray(x).astype(np.float32) for x in (out, expected))
        # Sums of FP8 products in another order; codes and scales are the same bits.
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2, err_msg=name)

    for m, n, k in SHAPES:
        rng = np.random.default_rng(m + n + k)
        x, w = (rng.standard_normal((side, k), np.float32) for side in (m, n))
        for tile in ((1, 128), (128, 1), (128, 128)):
            with jax.default_device(cpu):
                expected = xla.quantize(jnp.asarray(x), tile=tile, **options)
            out = mosaic_gpu.quantize(jnp.asarray(x), tile=tile, **options)
            for part, reference in zip(out, expected, strict=True):
                check(f"quantize {tile} {m}x{k}", part, reference)
        for name, (lhs_tile, rhs_tile) in _contenders.TILES.items():
            tiles = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
            kind = "1d1d" if name == "1d1d" else "1d2d"  # 2d1d is 1d2d, transposed.
            with jax.default_device(cpu):
                q = (
                    *xla.quantize(jnp.asarray(x), tile=lhs_tile, **options),
                    *xla.quantize(jnp.asarray(w), tile=rhs_tile, **options),
                )
                expected = xla.gemm(*q, out_dtype=jnp.float32, **tiles)
            args = jax.device_put(q, device)
            for out_dtype in ("bfloat16", "float32"):
                configs = every_gemm_config(kind, out_dtype)
                # The last shape with all of them, the others with what they get.
                for config in configs if (m, n, k) == SHAPES[-1] else [None]:
                    out = mosaic_gpu.multiply(
                        *args, **tiles, out_dtype=out_dtype, config=config
                    )
                    check(f"{name} {m}x{n}x{k} {config}", out, expected)
    print(f"{launches} results of Mosaic kernels are right")


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
