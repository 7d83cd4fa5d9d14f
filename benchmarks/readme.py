"""Writes the tables in README.md from the results beside this file.

    python -m benchmarks.readme [--check]

With --check it changes nothing and fails if README.md is not what the results say.
"""

import argparse
import csv
import math
import pathlib
import sys
import textwrap

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- measured: written by benchmarks/readme.py -->", "<!-- /measured -->"

PEAK_TFLOPS = 1979  # Dense FP8 of an H100 or H200, by the data sheet.
QUANTIZE_SHAPE = ("16384", "7168")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = "\n\n".join(map(wrap, sections()))
    new = "".join((before, BEGIN, "\n", written, "\n", END, after))
    if check and new != text:
        sys.exit("README.md differs from the results: run python -m benchmarks.readme.")
    if not check:
        README.write_text(new)


def sections() -> list[str]:
    """The paragraphs and tables, in order."""
    gemm = [row for row in read("gemm") if row["ratio"]]
    large = [r for r in gemm if r["gemm"] == "1d2d" and int(r["m"]) >= 4096]
    ratios = [float(r["ratio"]) for r in large]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    wgrad = [float(r["ratio"]) for r in gemm if r["gemm"] == "1d1d"]
    losses = read("train_lm_h200/summary")
    return [
        f"On one {gemm[0]['device']}, JAX {gemm[0]['jax']}, contenders side by side in "
        "one run. How, and all rows: [benchmarks/README.md](benchmarks/README.md).",
        "GEMM, 1x128 by 128x128, BF16 out, TFLOPS (peak "
        f"{PEAK_TFLOPS}), against cuBLASLt's blockwise FP8 kernel "
        "(`torch._scaled_mm`), whose bits it gives:",
        table(
            ["m, n, k", "fp8jax", "cuBLASLt blockwise", "ratio", "torch BF16"],
            [
                [
                    f"{r['m']}, {r['n']}, {r['k']}" + "*" * (r["clock"] == "kernel"),
                    r["fp8jax"],
                    r["cublaslt_blockwise"],
                    f"{float(r['ratio']):.2f}",
                    r["torch_bf16"],
                ]
                for r in large
            ],
        ),
        "(*) Shorter than 100 us: kernel time, one contender after the other.",
        f"Geometric mean {mean:.2f}. The weight gradient's 1x128 by 1x128 is at "
        f"{min(wgrad):.2f} to {max(wgrad):.2f} of cuBLASLt's, about BF16's speed: it "
        "is next.",
        "Quantization of bfloat16 "
        f"[{', '.join(QUANTIZE_SHAPE)}], GB/s of reads and writes:",
        table(
            ["tile", "fp8jax", "XLA's fusion", "x + 1 in BF16, by XLA"],
            [
                [r["tile"], r["fp8jax"], r["xla"], r["copy"]]
                for r in read("quantize")
                if (r["m"], r["k"]) == QUANTIZE_SHAPE and r["dtype"] == "bfloat16"
            ],
        ),
        "Training (`examples/train_lm.py --preset h200`: 85 M parameters, 25 M tokens, "
        "one seed):",
        table(
            ["arm", "training loss", "held-out loss", "tokens/s"],
            [
                [
                    r["arm"],
                    f"{float(r['train_loss']):.4f}",
                    f"{float(r['heldout_loss']):.4f}",
                    f"{float(r['tokens_per_second']):,.0f}",
                ]
                for r in losses
            ],
        ),
        f"The gap is {gap(losses, 'train_loss')} in training loss and "
        f"{gap(losses, 'heldout_loss')} held out. At this width (768) FP8 saves no "
        "time yet.",
    ]


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def gap(arms: list[dict[str, str]], loss: str) -> str:
    reference, other = (float(arm[loss]) for arm in arms)
    return f"{other / reference - 1:+.2%}"


def wrap(section: str) -> str:
    """A paragraph in lines of README's length; a table as it is."""
    return section if section.startswith("|") else textwrap.fill(section, 90)


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


if __name__ == "__main__":
    main()
