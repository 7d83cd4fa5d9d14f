"""Explains and measures the block shapes of FP8 GEMMs.

    python -m fp8jax.tune --explain M N K
    python -m fp8jax.tune M N K [M N K ...] [--out table.json]
    python -m fp8jax.tune --against bf16 M N K [M N K ...] [--recipe deepseek_v3]

[M, K] times [N, K] transposed; for wgrad (--kind 1d1d) K counts tokens. --explain
computes and needs no GPU. Without it, candidates are timed against each other on the
GPU present, and --out writes the fastest ones to a table for fp8jax.load_tuning; a
table that is there already is added to. --against bf16 times a layer of K inputs and N
outputs on M tokens: fprop and both gradients with every quantization, and in BF16.
"""

import argparse
import os
from collections.abc import Sequence

from fp8jax import recipes
from fp8jax._extras import needed_by
from fp8jax.kernels import check_available, mosaic_gpu
from fp8jax.kernels.mosaic_gpu import GemmProblem, Table
from fp8jax.tune._against import against_bf16
from fp8jax.tune._explain import explain
from fp8jax.tune._measure import best, measure

_RECIPES = {
    "deepseek_v3": recipes.deepseek_v3,
    "blocked_wgrad": recipes.blocked_wgrad,
    "bf16_wgrad": recipes.bf16_wgrad,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    sides = options.sides
    if len(sides) % 3 or min(sides) < 1:
        parser.error(f"takes M N K [M N K ...], integers from 1, got {sides}.")
    problems = [
        GemmProblem(options.kind, m, n, k, options.out_dtype)
        for m, n, k in zip(*[iter(sides)] * 3, strict=True)
    ]
    try:
        if options.table:
            mosaic_gpu.load_tuning(options.table)
        if options.against:
            _compare(parser, problems, options)
        elif options.explain:
            _explain(problems, options.num_sms or mosaic_gpu.num_sms())
        else:
            _tune(parser, problems, options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fp8jax.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sides", nargs="+", type=int, metavar="M N K")
    parser.add_argument(
        "--explain", action="store_true", help="print the config and why; no GPU"
    )
    parser.add_argument("--kind", choices=mosaic_gpu.GEMM_KINDS, default="1d2d")
    parser.add_argument(
        "--out-dtype", choices=("bfloat16", "float32"), default="bfloat16"
    )
    parser.add_argument("--table", help="a table to load first")
    parser.add_argument(
        "--num-sms", type=int, help="to explain for; of the GPU present, else 132"
    )
    parser.add_argument("--out", help="the table to write or to add to")
    parser.add_argument(
        "--against", choices=("bf16",), help="time a layer in FP8 and in this"
    )
    parser.add_argument(
        "--recipe",
        choices=sorted(_RECIPES),
        default="deepseek_v3",
        help="of the layer, for --against",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of five calls")
    return parser


def _explain(problems: list[GemmProblem], num_sms: int) -> None:
    print(
        *(
            explain(p.kind, p.m, p.n, p.k, out_dtype=p.out_dtype, num_sms=num_sms)
            for p in problems
        ),
        sep="\n\n",
    )


def _compare(
    parser: argparse.ArgumentParser,
    problems: list[GemmProblem],
    options: argparse.Namespace,
) -> None:
    _check_gpu(parser)
    for p in problems:
        recipe = _RECIPES[options.recipe]()
        print(against_bf16(p.m, p.n, p.k, recipe, rounds=options.rounds), flush=True)


def _check_gpu(parser: argparse.ArgumentParser) -> None:
    try:
        check_available("mosaic_gpu")
    except NotImplementedError as reason:
        parser.error(f"measuring {reason} --explain works without one.")


def _tune(
    parser: argparse.ArgumentParser,
    problems: list[GemmProblem],
    options: argparse.Namespace,
) -> None:
    _check_gpu(parser)
    try:
        with needed_by("measuring", "tune"):
            from fp8jax.tune import _view
    except ModuleNotFoundError as error:
        parser.error(str(error))
    keys = [problem.key for problem in problems]
    for problem in problems:
        if keys.count(problem.key) > 1:
            low, high = problem.bucket
            parser.error(
                f"m of {low} to {high} share one entry of a table: give one of them "
                f"for n={problem.n}, k={problem.k}."
            )
    # Before the minutes of measuring: a table that cannot be added to is refused now.
    sms, device_kind = mosaic_gpu.num_sms(), mosaic_gpu.present_device_kind()
    table = Table(device_kind, sms, {})
    if options.out and os.path.exists(options.out):
        table = mosaic_gpu.read_table(options.out, device_kind=device_kind, num_sms=sms)
    for problem in problems:
        candidates = mosaic_gpu.gemm_candidates(
            problem.kind, problem.m, problem.n, problem.k, problem.out_dtype, sms
        )
        timings = measure(problem, candidates, rounds=options.rounds)
        entry = best(problem, timings)
        _view.show(problem, timings, entry)
        if entry and options.out:
            # After each shape: what was measured stays if a later one fails.
            table = table.updated([entry])
            mosaic_gpu.write_table(options.out, table)
    if options.out:
        print(f"{len(table.entries)} entries in {options.out}")


if __name__ == "__main__":
    main()
