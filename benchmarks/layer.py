"""How fast is a dense layer, forward and both gradients, against BF16?

    python -m benchmarks.layer [--recipe deepseek_v3] [--hlo] [--rounds 7]

`y = x W`, `dx = dy Wᵀ`, `dW = xᵀ dy` in one jitted function of x, W and dy, all in
bfloat16, with every quantization. Writes benchmarks/results/layer.csv, and with --hlo
what the compiled FP8 program launches to layer_kernels.txt.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import _harness, _hlo
from benchmarks._peaks import PEAK_TFLOPS
from fp8jax import recipes
from fp8jax.tune._against import dense_layer, layer_arrays

SHAPES = [(16384, 7168, 7168), (8192, 4096, 14336), (4096, 2048, 7168)]
RECIPES = {
    "deepseek_v3": recipes.deepseek_v3(),
    "deepseek_v3_fp32": recipes.deepseek_v3("fp32"),
    "blocked_wgrad": recipes.blocked_wgrad(),
    "deepseek_v3_fp8_residual": recipes.deepseek_v3(residual="fp8"),
    "blocked_wgrad_fp8_residual": recipes.blocked_wgrad(residual="fp8"),
    "bf16_wgrad": recipes.bf16_wgrad(),
}
BASE = "jax bf16"


def main() -> None:
    options = options_parser(__doc__, ["deepseek_v3"]).parse_args()
    rows, programs = [], []
    print(
        f"{'tokens':>7}{'in':>7}{'out':>7}  {'contender':28}{'wall us':>9}"
        f"{'kernel us':>10}{'TFLOPS':>8}{'wall x':>8}{'kernel x':>9}"
    )
    for tokens, k, n in SHAPES:
        x, w, dout = layer_arrays(tokens, k, n)
        layers = {BASE: dense_layer(recipes.bf16())}
        layers |= {
            f"fp8jax {name}": dense_layer(RECIPES[name]) for name in options.recipe
        }
        rows += _rows((tokens, k, n), layers, (x, w, dout), options.rounds)
        for name in options.recipe if options.hlo else ():
            compiled = layers[f"fp8jax {name}"].lower(x, w, dout).compile()
            programs += [f"{name}: tokens {tokens}, in {k}, out {n}"]
            programs += [*_hlo.report(compiled.as_text() or ""), ""]
    path = _harness.write_csv("layer", rows, options.commit)
    print(f"ceiling {PEAK_TFLOPS} TFLOPS; wrote {path}")
    write_programs("layer_kernels", programs)


def options_parser(
    description: str | None, default: Sequence[str]
) -> argparse.ArgumentParser:
    """A parser with the options of a benchmark of recipes, those by default."""
    parser = _harness.options_parser(description)
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=sorted(RECIPES),
        default=list(default),
        help="one or more, timed side by side",
    )
    parser.add_argument(
        "--hlo", action="store_true", help="list what the FP8 program launches"
    )
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def write_programs(name: str, programs: list[str]) -> None:
    """Writes what was launched, if anything was listed, to `results/<name>.txt`."""
    if programs:
        path = _harness.RESULTS / f"{name}.txt"
        path.write_text("\n".join(programs))
        print(*programs, f"wrote {path}", sep="\n")


def _rows(
    shape: tuple[int, int, int],
    layers: dict[str, Any],
    arrays: tuple[jax.Array, ...],
    rounds: int,
) -> list[dict[str, Any]]:
    launch: dict[str, Callable[[], Any]] = {
        name: functools.partial(layer, *arrays) for name, layer in layers.items()
    }
    clocks = {
        name: _harness.kernel_clock(layer, *arrays) for name, layer in layers.items()
    }
    if _harness.HAS_TORCH:
        launch["torch bf16"] = _torch_layer(*map(_harness.to_torch, arrays))
        clocks["torch bf16"] = _harness.graph_clock(launch["torch bf16"], launches=4)
    wall = _harness.alternate(launch, launches=10, rounds=rounds)
    kernel = _harness.alternate_clocks(clocks, rounds=3)
    tokens, k, n = shape
    rows = []
    for name in launch:
        tflops = 6 * tokens * k * n / wall[name] * 1e-6
        ratios = [times[BASE] / times[name] for times in (wall, kernel)]
        print(
            f"{tokens:7}{k:7}{n:7}  {name:28}{wall[name]:9.1f}{kernel[name]:10.1f}"
            f"{tflops:8.0f}{ratios[0]:8.2f}{ratios[1]:9.2f}",
            flush=True,
        )
        rows.append(
            {
                "tokens": tokens,
                "in": k,
                "out": n,
                "contender": name,
                "wall_us": f"{wall[name]:.1f}",
                "kernel_us": f"{kernel[name]:.1f}",
                "tflops": f"{tflops:.0f}",
                "wall_speedup": f"{ratios[0]:.3f}",
                "kernel_speedup": f"{ratios[1]:.3f}",
            }
        )
    return rows


def _torch_layer(x, w, dout) -> Callable[[], Any]:
    def run():
        return x @ w, dout @ w.t(), x.t() @ dout

    return run


if __name__ == "__main__":
    main()
