"""Elementwise functions straight to FP8: one read of their inputs, nothing between."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from fp8jax import _dispatch
from fp8jax._elementwise import Elementwise
from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._spec import QuantSpec

# For a result and for its transpose; None where that is not asked for.
Specs = tuple[QuantSpec | None, QuantSpec | None]


def quantize_map(
    function: Elementwise,
    inputs: Sequence[jax.Array],
    specs: Sequence[Specs],
    *,
    implementation: str | None = None,
) -> tuple[tuple[QTensor | None, QTensor | None], ...]:
    """`quantize` of an elementwise function's results and of their transposes.

    Args:
        function: of matrices [m, k], numbers per row [m, 1] and per column [1, k].
        inputs: as `function.kinds` says.
        specs: for each result, of it and of its transpose, None to leave one out. They
            differ in their tiles alone.
        implementation: as in `quantize`.

    Returns:
        For each result, QTensors [m, k] and [k, m], None for what was left out.

    Raises:
        ValueError: If specs differ in more than their tiles, or none is given.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated.
    """
    found = _dispatch.call(
        "quantize_map",
        *inputs,
        implementation=implementation,
        **_static("quantize_map", function, specs),
    )
    out = []
    for codes, asked in zip(found, specs, strict=True):
        along, across = (
            None if q is None or spec is None else QTensor(q[0], q[1], spec.tile)
            for q, spec in zip(codes, asked, strict=True)
        )
        out.append((along, across))
    return tuple(out)


def maps_like_quantize(
    function: Elementwise,
    shape: tuple[int, int],
    specs: Sequence[Specs],
    implementation: str | None,
) -> bool:
    """Whether the kernels that run `quantize` of the results run the whole map, too.

    Args:
        function, specs, implementation: as in `quantize_map`.
        shape: of the matrices.
    """
    name = "quantize_map"
    shapes = {"matrix": shape, "rows": (shape[0], 1), "columns": (1, shape[1])}
    inputs = [
        jax.ShapeDtypeStruct(shapes[kind], dtype)
        for kind, dtype in zip(function.kinds, function.dtypes, strict=True)
    ]
    static = _static(name, function, specs)
    result = jax.ShapeDtypeStruct(shape, function.result_dtypes[0])
    how = {name: static[name] for name in ("dtype", "scale", "eps")}
    tile = next(tile for both in static["tiles"] for tile in both if tile is not None)
    try:
        mapped = _dispatch.resolve(
            name, *inputs, implementation=implementation, **static
        )
        plain = _dispatch.resolve(
            "quantize", result, implementation=implementation, tile=tile, **how
        )
    except NotImplementedError:
        return False
    return mapped == plain


def _static(name: str, function: Elementwise, specs: Sequence[Specs]) -> dict[str, Any]:
    formats = {
        dataclasses.replace(spec, tile=(1, 1))
        for both in specs
        for spec in both
        if spec is not None
    }
    if len(formats) != 1:
        raise ValueError(
            f"{name} takes specs that differ in their tiles alone, got {specs}."
        )
    (fmt,) = formats
    return {
        "function": function,
        "tiles": tuple(
            (one and one.tile, other and other.tile) for one, other in specs
        ),
        "dtype": fmt.dtype,
        "scale": fmt.scale,
        "eps": fmt.eps,
    }
