"""FP8 checkpoints from the command line.

    fp8jax quantize IN OUT      BF16/FP32 safetensors to FP8, 128x128 blocks
    fp8jax dequantize IN OUT    FP8 safetensors to BF16
    fp8jax inspect PATH         tensors, tiles, scales, bytes, codes
    fp8jax diff A B             tensors that differ; exits with 1 if any does

IN, PATH, A and B are safetensors files or folders; OUT is a folder. More:
docs/checkpoints.md.
"""

import argparse
import sys
from collections.abc import Sequence

from fp8jax import checkpoint
from fp8jax._extras import needed_by


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with needed_by("fp8jax", "cli"):
            from fp8jax.cli import _view
    except ModuleNotFoundError as error:
        parser.error(str(error))
    try:
        if options.command == "quantize":
            _quantize(options, _view)
        elif options.command == "dequantize":
            reader = checkpoint.Reader(options.source, tile=options.tile)
            with _view.progress(reader) as progress:
                outcomes = checkpoint.dequantize_checkpoint(
                    options.source,
                    options.target,
                    dtype=options.dtype,
                    tile=options.tile,
                    overwrite=options.overwrite,
                    progress=progress,
                )
            _view.show_outcomes(outcomes)
        elif options.command == "inspect":
            _inspect(parser, options, _view)
        else:
            differences = checkpoint.diff(options.first, options.second)
            _view.show_differences(differences)
            sys.exit(any(d.what != "same bits" for d in differences))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fp8jax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    quantize = commands.add_parser("quantize", help="BF16/FP32 safetensors to FP8")
    quantize.add_argument("source", metavar="IN")
    quantize.add_argument("target", metavar="OUT")
    quantize.add_argument("--scale", choices=("fp32", "ue8m0"), default="fp32")
    quantize.add_argument(
        "--include", action="append", default=[], metavar="REGEX", help="only these"
    )
    quantize.add_argument(
        "--exclude", action="append", default=[], metavar="REGEX", help="not these"
    )
    quantize.add_argument(
        "--ragged", action="store_true", help="sides that are no multiples of 128 too"
    )
    quantize.add_argument("--dry-run", action="store_true", help="write nothing")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT")

    dequantize = commands.add_parser("dequantize", help="FP8 safetensors to BF16")
    dequantize.add_argument("source", metavar="IN")
    dequantize.add_argument("target", metavar="OUT")
    dequantize.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16"
    )
    _add_tile(dequantize)
    dequantize.add_argument("--overwrite", action="store_true", help="replace OUT")

    inspect = commands.add_parser(
        "inspect", help="tensors, tiles, scales, bytes, codes"
    )
    inspect.add_argument("path", metavar="PATH")
    _add_tile(inspect)
    inspect.add_argument("--plot", metavar="PNG", help="histogram of the codes")

    diff = commands.add_parser("diff", help="tensors that differ")
    diff.add_argument("first", metavar="A")
    diff.add_argument("second", metavar="B")
    return parser


def _add_tile(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tile",
        type=_tile,
        metavar="ROWSxCOLUMNS",
        help="of FP8 weights, where config.json does not say it: 64x64",
    )


def _tile(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(s.isdecimal() and int(s) for s in sides):
        raise argparse.ArgumentTypeError(
            f"two sides are wanted, as 64x64, got {text!r}"
        )
    return int(sides[0]), int(sides[1])


def _quantize(options: argparse.Namespace, view) -> None:
    rules = checkpoint.WeightRules(
        include=options.include,
        exclude=options.exclude,
        ragged=options.ragged,
        scale=options.scale,
    )
    with view.progress(checkpoint.Reader(options.source)) as progress:
        outcomes = checkpoint.quantize_checkpoint(
            options.source,
            options.target,
            rules,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
            progress=progress,
        )
    view.show_outcomes(outcomes)


def _inspect(parser: argparse.ArgumentParser, options: argparse.Namespace, view):
    reader = checkpoint.Reader(options.path, tile=options.tile)
    histograms = {
        name: checkpoint.code_histogram(reader, name)
        for name, weight in reader.items()
        if weight.scale is not None
    }
    view.show_tensors(reader, histograms)
    if options.plot:
        try:
            with needed_by("--plot", "cli"):
                from fp8jax.cli._plot import plot_codes
        except ModuleNotFoundError as error:
            parser.error(str(error))
        plot_codes(reader, histograms, options.plot)
