"""Codes of arrays that XLA may split over devices: made once, and moved as codes.

A quantization and a product of codes are one operation each for XLA's partitioner.
What a product needs whole is gathered as codes and scales, one byte and little more,
and products of one value share its codes as on one device. There codes are matrices;
here they have a dimension for each of the array's, in the order batch, free,
contracted, so that each may be split over mesh axes of its own.

Tiles are those of the whole array. A shard whose edges cut tiles quantizes them as its
neighbours do (`_cut_tiles`); the scales along that side are then whole on each device.
A product is never split so: it takes the codes whole.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from fp8jax import numerics
from fp8jax._elementwise import Elementwise
from fp8jax.matmul import scaled_matmul
from fp8jax.ops._cut_tiles import quantize_cut
from fp8jax.ops._gemm import NO_GRADIENT, quantize_along, quantize_both_ways
from fp8jax.ops._layout import Layout, Operand
from fp8jax.ops._partition import Factorization, Factors, named, split_over_devices
from fp8jax.ops._partly_manual import Surroundings
from fp8jax.ops._sides import Sides, in_rules
from fp8jax.quant import QTensor, QuantSpec, maps_like_quantize, quantize_map

Codes: TypeAlias = tuple[jax.Array, jax.Array]  # And scales.
# Which side is contracted, 0 (rows) or 1 (columns), and the spec `[free, contraction]`.
Way: TypeAlias = tuple[int, QuantSpec]


def split_codes(
    operand: Operand,
    ways: tuple[tuple[Way, ...], ...],
    inputs: Sequence[jax.Array],
    implementation: str | None,
    function: Elementwise | None = None,
) -> tuple[Codes, ...]:
    """Codes and scales of an array, or of values that are computed from several.

    Args:
        operand: how the array, or a value, becomes a matrix; `has_split_codes`.
        ways: for the array, or for each of the function's results, how it is quantized:
            along one side, or along both with specs that differ in tiles alone.
        inputs: the array, or the function's inputs. Numbers per row or per column may
            come with dimensions of 1 or without.
        implementation: as in `quantize`.
        function: what is quantized, if it is not the array itself.

    Returns:
        For each way, in order.

    Raises:
        TypeError: When differentiated.
    """
    sides = Sides.of(operand)
    of_dim = dict(zip(operand.permutation, sides.names, strict=True))
    dims = tuple(of_dim[d] for d in range(len(of_dim)))
    kinds = ("matrix",) if function is None else function.kinds
    names = tuple(
        _input_names(kind, x.ndim, dims, i)
        for i, (kind, x) in enumerate(zip(kinds, inputs, strict=True))
    )
    sizes = tuple(zip(dims, inputs[0].shape, strict=True))
    key = sides, sizes, names, ways, implementation, function, Surroundings.here()
    run = numerics.refuse_derivatives(_split_quantization(*key), NO_GRADIENT)
    flat = run(*inputs)
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _input_names(kind: str, rank: int, dims: Factors, index: int) -> Factors:
    """Names of an input's dimensions; those of size 1 have names of their own."""
    if kind == "matrix":
        return dims
    ones = tuple(f"i{index}d{d}" for d in range(len(dims)))
    if kind == "rows":
        return (*dims[:-1], ones[-1])[:rank]
    return (*ones[:-1], dims[-1])[len(dims) - rank :]


@functools.cache
def _split_quantization(
    sides: Sides,
    sizes: tuple[tuple[str, int], ...],
    names: tuple[Factors, ...],
    ways: tuple[tuple[Way, ...], ...],
    implementation: str | None,
    function: Elementwise | None,
    here: Surroundings,
) -> Callable[..., tuple[jax.Array, ...]]:
    dims, whole = names[0], dict(sizes)
    order = tuple(dims.index(name) for name in sides.names)
    results, follows, tiles = [], [], {}
    for i, (contraction, spec) in enumerate(_each(ways)):
        codes = sides.contracting(contraction)
        scales, followed = codes.scales_of(spec.tile, i)
        results += [codes.names, scales]
        follows += followed
        tiles.update(codes.in_tiles(spec.tile))
    factors = Factorization(
        operands=names,
        results=tuple(results),
        multiples=tuple(tiles.items()),
        follows=tuple(follows),
        tiles=in_rules(tiles, whole),
        moves_results=True,
    )

    def run(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        here = dict(zip(dims, inputs[0].shape, strict=True))
        matrix = sides.matrix(here)
        if function is not None and _maps(function, matrix, ways, implementation):
            made = _mapped(function, inputs, matrix, ways, implementation)
        else:
            made = [
                q
                for x, several in zip(_values(function, inputs), ways, strict=True)
                for q in _quantized(
                    x.transpose(order).reshape(matrix), several, implementation
                )
            ]
        flat = []
        for q, (contraction, spec) in zip(made, _each(ways), strict=True):
            codes = sides.contracting(contraction)
            flat.append(q.data.reshape([here[name] for name in codes.names]))
            flat.append(q.scale.reshape(codes.scales(here, spec.tile)))
        return tuple(flat)

    def across(cut: Mapping[str, tuple[str, ...]]) -> Callable[..., Any]:
        def run(*inputs: jax.Array) -> tuple[jax.Array, ...]:
            flat = []
            for x, several in zip(_values(function, inputs), ways, strict=True):
                for contraction, spec in several:
                    codes = sides.contracting(contraction)
                    turned = x.transpose([dims.index(name) for name in codes.names])
                    in_tiles = codes.in_tiles(spec.tile)
                    how = in_tiles, spec, whole, cut
                    flat += quantize_cut(turned, codes.names, *how)
            return tuple(flat)

        return run

    name = named(
        "split_codes", sides, sizes, names, ways, implementation, function, here
    )
    return split_over_devices(run, factors, name, here.mesh, across)


def _each(ways: tuple[tuple[Way, ...], ...]) -> list[Way]:
    return [way for several in ways for way in several]


def _values(
    function: Elementwise | None, inputs: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """What is quantized, with all dimensions."""
    if function is None:
        return inputs
    rank = inputs[0].ndim
    full = []
    for x, kind in zip(inputs, function.kinds, strict=True):
        ones = [1] * (rank - x.ndim)
        shape = (*x.shape, *ones) if kind == "rows" else (*ones, *x.shape)
        full.append(x.reshape(shape))
    return function(*full)


def _quantized(
    x: jax.Array, ways: tuple[Way, ...], implementation: str | None
) -> tuple[QTensor, ...]:
    """Of `[*batch, rows, columns]`, in one read of it."""
    if len(ways) == 1:
        ((contraction, spec),) = ways
        return (quantize_along(x, contraction, spec, implementation),)
    (contraction, spec), (_, spec_t) = ways
    return quantize_both_ways(x, contraction, spec, spec_t, implementation)


def _specs(ways: tuple[Way, ...]) -> tuple[QuantSpec | None, QuantSpec | None]:
    """As `quantize_map` takes them: of the matrix, and of its transpose."""
    by_side = dict(ways)
    return by_side.get(1), by_side.get(0)


@functools.cache
def _maps(
    function: Elementwise,
    matrix: tuple[int, ...],
    ways: tuple[tuple[Way, ...], ...],
    implementation: str | None,
) -> bool:
    """Whether one kernel computes and quantizes; else one reads what XLA computes."""
    specs = tuple(map(_specs, ways))
    return maps_like_quantize(function, matrix, specs, implementation)


def _mapped(
    function: Elementwise,
    inputs: Sequence[jax.Array],
    matrix: tuple[int, ...],
    ways: tuple[tuple[Way, ...], ...],
    implementation: str | None,
) -> list[QTensor]:
    flat = function.arranged(inputs, matrix)
    found = quantize_map(
        function, flat, [*map(_specs, ways)], implementation=implementation
    )
    made = []
    for directions, several in zip(found, ways, strict=True):
        for contraction, _ in several:
            q = directions[1 - contraction]
            assert q is not None, "each way was asked for"
            made.append(q)
    return made


def multiply_split(
    lhs: Codes,
    rhs: Codes,
    layout: Layout,
    tiles: tuple[tuple[int, int], tuple[int, int]],
    out_dtype: np.dtype,
    implementation: str | None,
) -> jax.Array:
    """The product of split codes.

    Args:
        lhs, rhs: from `split_codes`, of the operands of a `dot_general`.
        layout: of the `dot_general`.
        tiles: of `lhs` and `rhs`, `[free, contraction]`.
        out_dtype: of the result, in which sums over devices are, too.
        implementation: as in `scaled_matmul`.

    Returns:
        As `lax.dot_general` gives it.
    """
    (contracted, _), _ = layout.numbers
    free = layout.lhs_free_rank, len(rhs[0].shape) - layout.batch_rank - len(contracted)
    arrays = *lhs, *rhs
    shapes = tuple(x.shape for x in (lhs[0], rhs[0]))
    key = layout.batch_rank, free, shapes, tiles, out_dtype, implementation
    run = _split_product(*key, Surroundings.here())
    return numerics.refuse_derivatives(run, NO_GRADIENT)(*arrays)


@functools.cache
def _split_product(
    batch_rank: int,
    free: tuple[int, int],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    tiles: tuple[tuple[int, int], tuple[int, int]],
    out_dtype: np.dtype,
    implementation: str | None,
    here: Surroundings,
) -> Callable[..., jax.Array]:
    def names(kind: str, count: int) -> Factors:
        return tuple(f"{kind}{i}" for i in range(count))

    batch, m, n = (
        names(kind, count)
        for kind, count in zip("bmn", (batch_rank, *free), strict=True)
    )
    contracted = names("k", len(shapes[0]) - len(batch) - len(m))
    both = Sides(batch, m, contracted), Sides(batch, n, contracted)
    operands, follows, parts, whole = [], [], {}, {}
    for i, (sides, shape, tile) in enumerate(zip(both, shapes, tiles, strict=True)):
        scales, followed = sides.scales_of(tile, i)
        operands += [sides.names, scales]
        follows += followed
        parts.update(sides.in_tiles(tile))
        whole.update(zip(sides.names, shape, strict=True))
    factors = Factorization(
        operands=tuple(operands),
        results=((*batch, *m, *n),),
        summed=contracted,
        multiples=tuple(parts.items()),
        follows=tuple(follows),
        tiles=in_rules(parts, whole),
    )

    def run(*arrays: jax.Array) -> jax.Array:
        found, local = [], {}
        for sides, tile, data, scale in zip(
            both, tiles, arrays[::2], arrays[1::2], strict=True
        ):
            sizes = dict(zip(sides.names, data.shape, strict=True))
            scales = dict(zip(sides.names, scale.shape, strict=True))
            local.update(sizes)
            q = data.reshape(sides.matrix(sizes)), scale.reshape(sides.matrix(scales))
            found.append(QTensor(*q, tile))

        def product(lhs: QTensor, rhs: QTensor) -> jax.Array:
            how: Any = {"out_dtype": out_dtype, "implementation": implementation}
            return scaled_matmul(lhs, rhs, **how)

        for _ in batch:
            product = jax.vmap(product)
        return product(*found).reshape([local[name] for name in (*batch, *m, *n)])

    key = batch_rank, free, shapes, tiles, out_dtype, implementation, here
    return split_over_devices(run, factors, named("split_product", *key), here.mesh)
