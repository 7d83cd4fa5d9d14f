"""What does `fp8_transform` do to whole train steps, and what does it cost itself?

    python -m benchmarks.transform

For a scanned, rematted decoder (`_decoders.py`) in each framework: which products are
in FP8, by role, and their share of the GEMMs' FLOPs; the time that the analysis takes
beside the step's compilation (tracing and rewriting included); and that of a call
beside one of the plain jitted step, for the same program (`recipes.bf16()`), so that
what differs is the way to it. All on the CPU, whose times say nothing of FP8's. Writes
benchmarks/results/transform.csv.
"""

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from benchmarks import _harness
from benchmarks._decoders import CASES, Case
from fp8jax import recipes
from fp8jax.transform import Report, fp8_transform

ROLES = ("fprop", "recompute", "dgrad", "wgrad")
ANALYSES, COMPILATIONS = 3, 1
LAUNCHES, ROUNDS = 20, 15


def main() -> None:
    options = _harness.options_parser(__doc__).parse_args()
    rows = []
    with jax.default_device(jax.devices("cpu")[0]):
        for framework, make in CASES.items():
            rows.append({"framework": framework, **_row(make)})
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    path = _harness.write_csv("transform", rows, options.commit)
    print(f"wrote {path}")


def _row(make: Callable[[], Case]) -> dict[str, Any]:
    case = make()
    report = fp8_transform(case.step).report(*case.args)
    # A new case is a new function, which JAX has not traced yet. The best of several:
    # other programs on the machine only ever add time.
    analysis = min(_seconds(_analyze, make()) for _ in range(ANALYSES))
    compilation = min(_seconds(_compile, make()) for _ in range(COMPILATIONS))
    plain, wrapped = _plain(make()), make()
    times = _harness.alternate(
        {
            "plain": functools.partial(plain.step, *plain.args),
            "wrapped": functools.partial(
                fp8_transform(wrapped.step, recipes.bf16()), *wrapped.args
            ),
        },
        launches=LAUNCHES,
        rounds=ROUNDS,
    )
    return {
        **_counts(report),
        "fraction": f"{report.fraction:.4f}",
        "analysis_ms": f"{analysis * 1e3:.0f}",
        "compile_ms": f"{compilation * 1e3:.0f}",
        "analysis_share": f"{analysis / compilation:.4f}",
        "plain_us": f"{times['plain']:.0f}",
        "wrapped_us": f"{times['wrapped']:.0f}",
        "dispatch_ratio": f"{times['wrapped'] / times['plain']:.3f}",
    }


def _counts(report: Report) -> dict[str, int]:
    """Products in FP8 by role, and those that stay."""
    fp8 = collections.Counter(r.role for r in report.rows if r.status == "fp8")
    left = [r for r in report.rows if r.status == "skipped"]
    attention = sum(r.role == "other" for r in left)
    return {
        "products": len(report.rows),
        **{role: fp8[role] for role in ROLES},
        "head": len(left) - attention,
        "attention": attention,
    }


def _plain(case: Case) -> Case:
    """The step as it would be called without the transform: jitted."""
    if isinstance(case.args[0], nnx.Module):
        return Case(nnx.jit(case.step), case.args, case.path, case.head)
    return case


def _analyze(case: Case) -> None:
    fp8_transform(case.step).report(*case.args)


def _compile(case: Case) -> None:
    fp8_transform(case.step).lower(*case.args).compile()


def _seconds(run: Callable[[Case], None], case: Case) -> float:
    start = time.perf_counter()
    run(case)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
