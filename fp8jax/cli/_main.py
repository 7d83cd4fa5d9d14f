"""FP8 checkpoints from the command line.

    fp8jax quantize IN OUT      BF16/FP32 safetensors to FP8, 128x128 blocks
    fp8jax dequantize IN OUT    FP8 safetensors to BF16
    fp8jax inspect PATH         tensors, kinds of scales, bytes
    fp8jax diff A B             tensors that differ

IN, PATH, A and B are safetensors files or folders; OUT is a folder. With --json a
command prints one array of objects instead of a table. Exit codes: 0; 1 where values
differ (diff); 2 for an error; 3 where a weight holds NaN or infinities (quantize); 4
where dtypes differ and all values are the same (diff). More: docs/checkpoints.md.
"""

import argparse
import sys
from collections.abc import Sequence

from fp8jax import checkpoint
from fp8jax._extras import needed_by
from fp8jax._version import __version__


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
            _show_outcomes(options, outcomes, _view)
        elif options.command == "inspect":
            _inspect(parser, options, _view)
        else:
            _diff(options, _view)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("fp8jax: interrupted; the same command goes on where it was.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fp8jax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    quantize = commands.add_parser("quantize", help="BF16/FP32 safetensors to FP8")
    quantize.add_argument("source", metavar="IN", help="file or folder to read")
    quantize.add_argument("target", metavar="OUT", help="folder to write")
    quantize.add_argument(
        "--scale",
        choices=("fp32", "ue8m0"),
        default="fp32",
        help="float32 scales, or powers of two in a byte each",
    )
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
    dequantize.add_argument("source", metavar="IN", help="file or folder to read")
    dequantize.add_argument("target", metavar="OUT", help="folder to write")
    dequantize.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of what was FP8",
    )
    _add_tile(dequantize)
    dequantize.add_argument("--overwrite", action="store_true", help="replace OUT")

    inspect = commands.add_parser("inspect", help="tensors, kinds of scales, bytes")
    inspect.add_argument("path", metavar="PATH", help="file or folder to read")
    _add_tile(inspect)
    inspect.add_argument(
        "--codes",
        action="store_true",
        help="read all codes and scales, for their shares and ranges",
    )
    inspect.add_argument(
        "--plot", metavar="PNG", help="histogram of the codes, which reads them"
    )

    diff = commands.add_parser("diff", help="tensors that differ")
    diff.add_argument("first", metavar="A", help="file or folder")
    diff.add_argument("second", metavar="B", help="file or folder")
    for command in (quantize, dequantize, inspect, diff):
        command.add_argument("--json", action="store_true", help="print no table")
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


def _diff(options: argparse.Namespace, view) -> None:
    differences = checkpoint.diff(options.first, options.second)
    (view.show_json if options.json else view.show_differences)(differences)
    kinds = {d.what for d in differences} - {"same bits"}
    sys.exit(0 if not kinds else 4 if kinds == {"same values"} else 1)


def _show_outcomes(options: argparse.Namespace, outcomes, view) -> None:
    (view.show_json if options.json else view.show_outcomes)(outcomes)


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
    _show_outcomes(options, outcomes, view)
    odd = view.not_numbers(outcomes)
    if odd:
        print(f"fp8jax: NaN or infinities in {', '.join(odd)}", file=sys.stderr)
        sys.exit(3)


def _inspect(parser: argparse.ArgumentParser, options: argparse.Namespace, view):
    reader = checkpoint.Reader(options.path, tile=options.tile)
    histograms = {
        name: checkpoint.code_histogram(reader, name)
        for name, weight in reader.items()
        if weight.scale is not None and (options.codes or options.plot)
    }
    rows = view.tensors(reader, histograms)
    (view.show_json if options.json else view.show_tensors)(rows)
    if options.plot:
        try:
            with needed_by("--plot", "cli"):
                from fp8jax.cli._plot import plot_codes
        except ModuleNotFoundError as error:
            parser.error(str(error))
        plot_codes(reader, histograms, options.plot)
