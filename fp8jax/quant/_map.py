"""Elementwise functions straight to FP8: one read of their inputs, nothing between."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from fp8jax import _dispatch
from fp8jax._elementwise import Elementwise
from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._spec import QuantSpec

# Of a matrix, and of its transpose; None where it was not asked for.
Specs = tuple[QuantSpec | None, QuantSpec | None]
Directions = tuple[QTensor | None, QTensor | None]


def quantize_map(
    function: Elementwise,
    inputs: Sequence[jax.Array],
    specs: Sequence[Specs],
    *,
    implementation: str | None = None,
) -> tuple[Directions, ...]:
    """`quantize` of an elementwise function's results and of their transposes.

    Args:
        function: of matrices [m, k], numbers per row [m, 1] and per column [1, k].
        inputs: as `function.kinds` says. A function of matrices alone takes batches of
            them, [*batch, m, k].
        specs: for each result, of it and of its transpose, None to leave one out. They
            differ in their tiles alone.
        implementation: as in `quantize`.

    Returns:
        For each result, QTensors [m, k] and [k, m], None for what was left out; after
        the batch's dimensions.

    Raises:
        ValueError: If specs differ in more than their tiles, or none is given.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated.
    """
    if inputs[0].ndim > 2:
        run = functools.partial(
            quantize_map, function, specs=specs, implementation=implementation
        )
        return jax.vmap(lambda *matrices: run(matrices))(*inputs)
    found = _dispatch.call(
        "quantize_map",
        *inputs,
        implementation=implementation,
        **_static("quantize_map", function, specs),
    )
    return tuple(map(in_both_directions, found, specs))


def in_both_directions(codes: Any, specs: Specs) -> Directions:
    """Codes and scales of a value and of its transpose, as QTensors.

    Args:
        codes: `fp8jax.kernels.Directions`.
        specs: as they were asked for; None where they were not.
    """
    along, across = (
        None if q is None or spec is None else QTensor(q[0], q[1], spec.tile)
        for q, spec in zip(codes, specs, strict=True)
    )
    return along, across


def maps_like_quantize(
    function: Elementwise,
    shape: tuple[int, ...],
    specs: Sequence[Specs],
    implementation: str | None,
) -> bool:
    """Whether the kernels that run `quantize` of the results run the whole map, too.

    Args:
        function, specs, implementation: as in `quantize_map`.
        shape: of the matrices, [m, k] or, of a batch, [*batch, m, k].
    """
    *batch, m, k = shape
    if batch and set(function.kinds) != {"matrix"}:
        return False  # Each entry would be a launch of its own.
    name = "quantize_map"
    inputs = [
        jax.ShapeDtypeStruct(of_input, dtype)
        for of_input, dtype in zip(function.shapes(m, k), function.dtypes, strict=True)
    ]
    static = _static(name, function, specs)
    result = jax.ShapeDtypeStruct((m, k), function.result_dtypes[0])
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
