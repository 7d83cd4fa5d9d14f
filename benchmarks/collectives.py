"""What do eight H100s send one another in a train step, plain and in FP8?

    pip install -e ".[test,compiled]"
    JAX_PLATFORMS=cpu python -m benchmarks.collectives [--parallel dp fsdp tp]

Needs no GPU: a small decoder's step (`_llama.py`) is compiled by XLA for eight H100s of
one host, and its scheduled HLO is read. Each row is one kind of exchange: how often it
runs in a step, the megabytes that a device sends on a ring, how many instructions run
while it is under way, and how many of them are Mosaic kernels (the least of all its
runs; `-` where everything waits). Loops count as often as they run.
"""

import argparse
import collections
import sys

import fp8jax
from benchmarks import _h100, _hlo
from benchmarks._llama import Decoder
from fp8jax import recipes

PARALLEL = ["dp", "fsdp", "tp"]
DEVICES = 8


def main() -> None:
    options = _parser().parse_args()
    try:
        mesh = _h100.mesh(DEVICES)
    except RuntimeError as error:
        sys.exit(str(error))
    recipe = recipes.PRESETS[options.recipe]()
    for parallel in options.parallel:
        decoder = Decoder(parallel=parallel, remat=options.remat)
        step, args = decoder.step(mesh)
        contenders = {"plain": step, options.recipe: fp8jax.fp8_transform(step, recipe)}
        for name, contender in contenders.items():
            program = _hlo.parse(_h100.compiled(contender, *args))
            print(*report(f"{parallel}, {name}", program), "", sep="\n", flush=True)


def report(title: str, program: _hlo.Program) -> list[str]:
    """Lines: totals, then each kind of exchange, the most bytes first."""
    found = _hlo.collectives(program)
    kernels = _hlo.kernels(program)
    products = sum(kernel.times for kernel in kernels if kernel.is_product)
    quantizations = sum(kernel.times for kernel in kernels if kernel.is_quantization)
    lines = [
        f"{title}: {_hlo.sent(found) / 1e6:.2f} MB sent by a device; on each, "
        f"{products} products and {quantizations} quantizations in Mosaic kernels, "
        f"{len(_hlo.emulated(program))} instructions of XLA's in FP8",
        f"  {'exchange':20}{'runs':>6}{'MB':>9}{'between':>9}{'kernels':>9}  arrays",
    ]
    kinds = collections.defaultdict(list)
    for collective in found:
        kinds[collective.opcode, _arrays(collective)].append(collective)
    rows = sorted(kinds.items(), key=lambda row: -_hlo.sent(row[1]))
    for (opcode, arrays), alike in rows:
        between = [len(c.between) for c in alike if c.between is not None]
        waits = len(between) < len(alike)
        lines.append(
            f"  {opcode:20}{sum(c.times for c in alike):6}{_hlo.sent(alike) / 1e6:9.2f}"
            f"{'-' if waits else min(between):>9}{min(c.kernels for c in alike):9}"
            f"  {arrays}"
        )
    return lines


def _arrays(collective: _hlo.Collective) -> str:
    """Types, with how many there are of each."""
    types = collections.Counter(
        f"{array.dtype}[{','.join(map(str, array.shape))}]"
        for array in collective.arrays
    )
    return " ".join(f"{n}x{kind}" if n > 1 else kind for kind, n in types.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parallel", nargs="+", choices=PARALLEL, default=PARALLEL)
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="dots")
    parser.add_argument("--recipe", choices=recipes.PRESETS, default="deepseek_v3")
    return parser


if __name__ == "__main__":
    main()
