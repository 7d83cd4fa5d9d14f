"""Writes the tables in README.md and benchmarks/README.md from the results.

    python -m benchmarks.readme [--check]

README.md gets what matters most, benchmarks/README.md every row. With --check it
changes nothing and fails if a file is not what the results say.
"""

import argparse
import csv
import pathlib
import sys
import textwrap
from collections.abc import Iterable

from benchmarks._group_tables import (
    grouped_summary,
    grouped_table,
    moe_summary,
    moe_table,
)
from benchmarks._inference_tables import inference_summary, inference_table
from benchmarks._model_tables import batched_table, gemm_models_table, narrow_table
from benchmarks._peaks import H200, MEMORY_GBPS, PEAK_RATIO, PEAK_TFLOPS
from benchmarks._tables import Rows, mean, table

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- measured: written by benchmarks/readme.py -->", "<!-- /measured -->"

MEMORY = MEMORY_GBPS[H200]
QUANTIZE_SHAPE = ("16384", "7168")
FP8_ROLES = ("fprop", "recompute", "dgrad", "wgrad")
DECODE = ("16", "7168", "16384")  # m, n, k in README.md.
# Of the quantizations, in README.md: the plain one, two in one pass, and the slowest.
QUANTIZED = ("1x128", "1x128, both ways", "swiglu, both ways", "rms_norm, 1x128")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    files = {HERE.parent / "README.md": summary(), HERE / "README.md": every_row()}
    for path, sections in files.items():
        text = path.read_text()
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        written = "\n\n".join(map(wrap, sections))
        new = "".join((before, BEGIN, "\n", written, "\n", END, after))
        if check and new != text:
            sys.exit(
                f"{path.relative_to(HERE.parent)} differs from the results: run "
                "python -m benchmarks.readme."
            )
        if not check:
            path.write_text(new)


def summary() -> list[str]:
    """README.md's paragraphs and tables, in order."""
    gemm = read("gemm")
    rows = [*gemm_summary(gemm), *grouped_summary(read("grouped"))]
    rows += [*moe_summary(read("moe")), *inference_summary(read("inference"))]
    rows += [*decode_summary(), *quantize_summary()]
    newer = [read(name)[:1] for name in ("grouped", "moe", "inference")]
    others = {r["device"] for found in newer for r in found} - {gemm[0]["device"]}
    elsewhere = f" (groups, mixtures, decoding: {', '.join(others)})" if others else ""
    by_m = ""
    if (RESULTS / "gemm_by_m.png").exists():
        by_m = "; how they [grow with m](benchmarks/results/gemm_by_m.png)"
    return [
        f"On one {gemm[0]['device']}{elsewhere}, JAX {gemm[0]['jax']}, contenders side "
        "by side in one run; 1x128 by 128x128 gives cuBLASLt's bits. How, and all "
        f"rows: [benchmarks/README.md](benchmarks/README.md){by_m}.",
        table(["what", "fp8jax", "against", "ratio", "ceiling"], rows),
        "Training (`examples/`, `--preset h200`, one seed). `train_lm.py`: 85 M "
        "parameters, 25 M tokens; speeds are older: now FP8 is 1.04 times BF16 here. "
        "`train_moe.py`: 468 M parameters, 16 experts a layer, 6.6 M tokens; BF16 by "
        "`lax.ragged_dot`.",
        table(
            ["model", "arm", "training loss", "held-out loss", "gaps", "tokens/s"],
            [row for name in ("train_lm", "train_moe") for row in training_rows(name)],
        ),
    ]


def training_rows(program: str) -> list[list[str]]:
    """What an example's run on the H200 preset gave, in both arms."""
    losses = read(f"{program}_h200/summary")
    gaps = " and ".join(gap(losses, c) for c in ("train_loss", "heldout_loss"))
    return [
        [
            program,
            r["arm"],
            f"{float(r['train_loss']):.4f}",
            f"{float(r['heldout_loss']):.4f}",
            gaps if r["arm"] == "fp8" else "",
            f"{float(r['tokens_per_second']):,.0f}",
        ]
        for r in losses
    ]


def every_row() -> list[str]:
    """benchmarks/README.md's tables, in order; those without results are left out."""
    return [
        *gemm_tables(read("gemm")),
        *gemm_models_table(read("gemm_models")),
        *layer_table(read("layer")),
        *narrow_table(read("narrow")),
        *batched_table(read("batched")),
        *grouped_table(read("grouped")),
        *moe_table(read("moe")),
        *inference_table(read("inference")),
        *decode_table(read("decode")),
        *quantize_table(read("quantize")),
        *transform_table(read("transform")),
    ]


def gemm_summary(gemm: Rows) -> list[list[str]]:
    """Geometric means of the GEMMs, and the layer's rows."""
    names = {
        "1d2d": "GEMM 1x128 by 128x128, {} shapes with m >= 4096, TFLOPS",
        "1d1d": "GEMM 1x128 by 1x128 (wgrad), {} shapes, TFLOPS",
        "2d1d": "GEMM 128x128 by 1x128 (wgrad, x in blocks), {} shapes, TFLOPS",
    }
    rows = []
    for kind, name in names.items():
        of_kind = [r for r in gemm if r["gemm"] == kind and r["ratio"]]
        of_kind = [r for r in of_kind if int(r["m"]) >= 4096 or kind != "1d2d"]
        if not of_kind:
            continue
        ratios = [float(r["ratio"]) for r in of_kind]
        ours, other, per_tensor = (
            mean(float(r[column]) for r in of_kind)
            for column in ("fp8jax", "cublaslt_blockwise", "cublaslt_per_tensor_fast")
        )
        rows.append(
            [
                name.format(len(of_kind)),
                f"{ours:.0f}",
                f"{other:.0f} cuBLASLt blockwise",
                f"{mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{per_tensor:.0f} per tensor, {PEAK_TFLOPS} peak",
            ]
        )
    for base, r in layers(read("layer")):
        rows.append(
            [
                f"Layer {r['in']} to {r['out']}, {r['tokens']} tokens, "
                f"{r['contender'].removeprefix('fp8jax ')}: fprop, dgrad, wgrad, us",
                f"{float(r['wall_us']):.0f}",
                f"{float(base['wall_us']):.0f} BF16",
                f"{float(r['wall_speedup']):.2f}",
                f"{PEAK_RATIO:.2f}",
            ]
        )
    return rows


def decode_summary() -> list[list[str]]:
    return [
        [
            f"GEMM m={r['m']}, n={r['n']}, k={r['k']}, GB/s of the weight",
            r["weight_gbps"],
            f"{r['copy_gbps']} a copy",
            f"{float(r['of_copy']):.2f}",
            f"{MEMORY}",
        ]
        for r in read("decode")
        if (r["m"], r["n"], r["k"]) == DECODE
    ]


def quantize_summary() -> list[list[str]]:
    return [
        [
            f"Quantize {r['what']}; BF16 [{', '.join(QUANTIZE_SHAPE)}], GB/s",
            r["fp8jax"],
            f"{r['xla']} XLA's fusion",
            f"{float(r['fp8jax']) / float(r['xla']):.2f}",
            f"{MEMORY}",
        ]
        for r in quantize_rows(read("quantize"))
        if r["what"] in QUANTIZED
    ]


def gemm_tables(gemm: Rows) -> list[str]:
    return [
        f"GEMM, BF16 out, TFLOPS (peak {PEAK_TFLOPS}). Per tensor, with one scale and "
        "fast accumulation, is what the tensor cores sustain.",
        table(
            ["m, n, k", "fp8jax", "blockwise", "ratio", "per tensor", "BF16", "clock"],
            [
                [
                    f"{r['gemm']} {r['m']}, {r['n']}, {r['k']}",
                    r["fp8jax"],
                    r["cublaslt_blockwise"],
                    f"{float(r['ratio']):.2f}" if r["ratio"] else "",
                    r["cublaslt_per_tensor_fast"],
                    r["torch_bf16"],
                    r["clock"],
                ]
                for r in gemm
            ],
        ),
    ]


def layer_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    return [
        "Dense layer: output and both gradients, every quantization included. TFLOPS "
        f"by wall time (FP8 peak {PEAK_TFLOPS}), speed against JAX in BF16 (ceiling "
        f"{PEAK_RATIO:.2f}).",
        table(
            ["tokens, in, out", "contender", "us", "TFLOPS", "speed", "kernels only"],
            [
                [
                    f"{r['tokens']}, {r['in']}, {r['out']}",
                    r["contender"],
                    r["wall_us"],
                    r["tflops"],
                    f"{float(r['wall_speedup']):.2f}",
                    f"{float(r['kernel_speedup']):.2f}",
                ]
                for r in rows
            ],
        ),
    ]


def decode_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    return [
        "GEMM of few rows, the weight not in the cache: GB/s of the weight, beside a "
        f"copy of it (reads and writes; the memory's {MEMORY}).",
        table(
            ["m, n, k", "us", "TFLOPS", "GB/s", "a copy", "of it", "over cuBLASLt"],
            [
                [
                    f"{r['m']}, {r['n']}, {r['k']}",
                    r["us"],
                    r["tflops"],
                    r["weight_gbps"],
                    r["copy_gbps"],
                    f"{float(r['of_copy']):.2f}",
                    f"{float(r['ratio']):.2f}" if r["ratio"] else "",
                ]
                for r in rows
            ],
        ),
    ]


def quantize_table(rows: Rows) -> list[str]:
    return [
        f"Quantization of bfloat16 [{', '.join(QUANTIZE_SHAPE)}], GB/s of reads and "
        f"writes (the memory's {MEMORY}):",
        table(
            ["what", "fp8jax", "XLA's fusion", "x + 1 in BF16, by XLA"],
            [
                [r["what"], r["fp8jax"], r["xla"], r["copy"]]
                for r in quantize_rows(rows)
            ],
        ),
    ]


def transform_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    head = ["step", "products", "in FP8, by role", "left", "of the FLOPs"]
    device, jax = rows[0]["device"], rows[0]["jax"]
    return [
        "`fp8_transform` of a small decoder's step (scan over layers, remat, Adam; "
        f"{device}, JAX {jax}): what is in FP8; its analysis beside the step's "
        "compilation; a call beside one of the jitted step, nothing in FP8 in either.",
        table(
            [*head, "analysis, ms", "of compilation", "call, us", "of the plain one"],
            [
                [
                    r["framework"],
                    r["products"],
                    ", ".join(f"{r[role]} {role}" for role in FP8_ROLES),
                    f"{r['attention']} attention, {r['head']} head",
                    f"{float(r['fraction']):.1%}",
                    r["analysis_ms"],
                    f"{float(r['analysis_share']):.1%}",
                    r["wrapped_us"],
                    f"{float(r['dispatch_ratio']):.2f}",
                ]
                for r in rows
            ],
        ),
    ]


def quantize_rows(rows: Rows) -> Rows:
    return [
        r
        for r in rows
        if (r["m"], r["k"]) == QUANTIZE_SHAPE and r["dtype"] == "bfloat16"
    ]


def layers(rows: Rows) -> Iterable[tuple[dict[str, str], dict[str, str]]]:
    """Each FP8 layer with the BF16 one of its shape."""
    bases = {
        (r["tokens"], r["in"], r["out"]): r
        for r in rows
        if r["contender"] == "jax bf16"
    }
    for r in rows:
        if r["contender"].startswith("fp8jax "):
            yield bases[r["tokens"], r["in"], r["out"]], r


def read(name: str) -> Rows:
    """The rows of a CSV; none where it has not been measured."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def gap(arms: Rows, loss: str) -> str:
    reference, other = (float(arm[loss]) for arm in arms)
    return f"{other / reference - 1:+.2%}"


def wrap(section: str) -> str:
    """A paragraph in lines of README's length; a table as it is."""
    return section if section.startswith("|") else textwrap.fill(section, 90)


if __name__ == "__main__":
    main()
