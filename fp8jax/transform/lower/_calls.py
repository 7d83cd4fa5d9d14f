"""The marked calls that stand in for a product: what each computes, by itself.

A call is a function made by `ops.marked`. All are hashable, so
that equal calls are traced once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import ops
from fp8jax._elementwise import Elementwise
from fp8jax.ops import marked
from fp8jax.quant import QTensor, QuantSpec, moments, quantize_map
from fp8jax.transform.analysis import Role, Side
from fp8jax.transform.plan import LayerDot, QuantizedDot


@dataclasses.dataclass(frozen=True)
class Quantize:
    """A marked call that quantizes an operand: its codes and scales.

    Attributes:
        operand: which sides of the array are contracted.
        spec: for `[free, contraction]`, as which the codes come.
        implementation: as in `fp8jax.dot_general`.
        is_early: whether it belongs into the forward pass.
        split: whether XLA may split it over devices: then codes have a dimension for
            each of the array's.
    """

    operand: ops.Operand
    spec: QuantSpec
    implementation: str | None
    is_early: bool = False
    split: bool = False

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return marked("quantize", self._run)(x)

    def _run(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.split:
            ways = ((self.way,),)
            (codes,) = ops.split_codes(self.operand, ways, [x], self.implementation)
            return codes
        q = ops.quantize_operand(x, self.operand, self.spec, self.implementation)
        return q.data, q.scale

    @property
    def way(self) -> tuple[int, QuantSpec]:
        """The contracted side, and how the matrix is quantized along it."""
        return self.operand.contraction, self.spec

    @property
    def matrix(self) -> ops.Operand:
        """The operand without its contracted side: one key per matrix."""
        return dataclasses.replace(self.operand, contraction=1)

    @property
    def other_tiles(self) -> QuantSpec:
        """The spec without its tile: specs that differ in tiles alone are equal."""
        return dataclasses.replace(self.spec, tile=(1, 1))

    def stacked(self, length: int) -> "Quantize":
        """The quantization of `length` such arrays, stacked, to stacked codes."""
        old = self.operand
        permutation = (0, *(1 + dim for dim in old.permutation))
        batch, rows, columns = old.ranks
        ranks = 1 + batch, rows, columns
        shape = (length, *old.shape)
        operand = ops.Operand(permutation, shape, old.contraction, ranks)
        return dataclasses.replace(self, operand=operand)


@dataclasses.dataclass(frozen=True)
class QuantizeBoth:
    """A marked call that makes the codes and scales of two, in one read of x.

    Attributes:
        one, other: of one matrix, one along its rows and one along its columns.
    """

    one: Quantize
    other: Quantize

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return marked("quantize_both", self._run)(x)

    def _run(self, x: jax.Array) -> tuple[jax.Array, ...]:
        one, other = self.one, self.other
        if one.split:
            ways = ((one.way, other.way),)
            made = ops.split_codes(one.operand, ways, [x], one.implementation)
            return tuple(a for codes in made for a in codes)
        both = ops.quantize_operand_both(
            x, one.operand, one.spec, other.spec, one.implementation
        )
        return tuple(a for q in both for a in (q.data, q.scale))


@dataclasses.dataclass(frozen=True)
class QuantizeMap:
    """A marked call that makes codes of values that it computes elementwise.

    Attributes:
        function: of the values, as matrices.
        shape: of those matrices, after a batch's.
        ways: for each of its results, how it is quantized: along one side or both.
    """

    function: Elementwise
    shape: tuple[int, ...]
    ways: tuple[tuple[Quantize, ...], ...]

    @property
    def specs(self) -> tuple[tuple[QuantSpec | None, QuantSpec | None], ...]:
        """Of each result and of its transpose, None where it is not quantized."""
        by_side = [{way.operand.contraction: way for way in ways} for ways in self.ways]
        return tuple(
            (ways[1].spec if 1 in ways else None, ways[0].spec if 0 in ways else None)
            for ways in by_side
        )

    @property
    def implementation(self) -> str | None:
        return self.ways[0][0].implementation

    def __call__(self, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        return marked("quantize_map", self._run)(*inputs)

    def _run(self, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        first = self.ways[0][0]
        if first.split:
            made = ops.split_codes(
                first.operand,
                tuple(tuple(way.way for way in ways) for ways in self.ways),
                inputs,
                self.implementation,
                self.function,
            )
            return tuple(a for codes in made for a in codes)
        arrays = self.function.arranged(inputs, self.shape)
        found = quantize_map(
            self.function, arrays, self.specs, implementation=self.implementation
        )
        codes: list[jax.Array] = []
        for (along, across), ways in zip(found, self.ways, strict=True):
            for way in ways:
                q = along if way.operand.contraction == 1 else across
                assert q is not None, "each way was asked for"
                codes += [q.data, q.scale]
        return tuple(codes)


@dataclasses.dataclass(frozen=True)
class Multiply:
    """A marked call that multiplies codes: `(lhs, its scale, rhs, its scale)`.

    Attributes:
        exchanged: whether to multiply rhs by lhs and transpose the result, for a reader
            that transposes it back: XLA cancels the two, and nothing moves.
        split: whether XLA may split it over devices, as the quantizations are.
    """

    role: Role
    layout: ops.Layout
    tiles: tuple[tuple[int, int], tuple[int, int]]
    out_dtype: np.dtype
    implementation: str | None
    exchanged: bool = False
    split: bool = False

    def __call__(self, *codes: jax.Array) -> jax.Array:
        return marked(self.role, self._run)(*codes)

    def _run(self, *codes: jax.Array) -> jax.Array:
        lhs, rhs = (codes[0], codes[1]), (codes[2], codes[3])
        if not self.exchanged:
            return self._product(lhs, rhs, self.layout, self.tiles)
        layout, (lhs_tile, rhs_tile) = self.layout.exchanged, self.tiles
        out = self._product(rhs, lhs, layout, (rhs_tile, lhs_tile))
        return layout.exchange_sides(out)

    def _product(
        self,
        lhs: tuple[jax.Array, jax.Array],
        rhs: tuple[jax.Array, jax.Array],
        layout: ops.Layout,
        tiles: tuple[tuple[int, int], tuple[int, int]],
    ) -> jax.Array:
        how = self.out_dtype, self.implementation
        if self.split:
            return ops.multiply_split(lhs, rhs, layout, tiles, *how)
        (x, x_scale), (y, y_scale) = lhs, rhs
        q_lhs, q_rhs = QTensor(x, x_scale, tiles[0]), QTensor(y, y_scale, tiles[1])
        return ops.multiply_operands(q_lhs, q_rhs, layout, *how)


@dataclasses.dataclass(frozen=True)
class Product:
    """A marked call that quantizes and multiplies, for XLA to split over devices.

    Attributes:
        exchanged: as in `Multiply`.
    """

    what: QuantizedDot
    layout: ops.Layout
    out_dtype: np.dtype
    exchanged: bool = False

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return marked(self.what.role, self._run)(lhs, rhs)

    def _run(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        run = functools.partial(
            ops.quantized_dot,
            preferred_element_type=self.out_dtype,
            implementation=self.what.implementation,
            split=True,
        )
        lhs_spec, rhs_spec = self.what.lhs_spec, self.what.rhs_spec
        if not self.exchanged:
            return run(lhs, rhs, self.layout.numbers, lhs_spec, rhs_spec)
        layout = self.layout.exchanged
        out = run(rhs, lhs, layout.numbers, rhs_spec, lhs_spec)
        return layout.exchange_sides(out)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A marked call of `ops.dot_general`."""

    what: LayerDot
    dimension_numbers: Any
    precision: Any
    preferred_element_type: Any

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return marked("dot_general", self._run)(lhs, rhs)

    def _run(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        dot = functools.partial(
            ops.dot_general,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            recipe=self.what.recipe,
            implementation=self.what.implementation,
        )
        if self.what.weight == "rhs":
            return dot(lhs, rhs, self.dimension_numbers)
        # `ops.dot_general` takes the weight second, and gives its dimensions last.
        numbers = tuple((right, left) for left, right in self.dimension_numbers)
        layout = ops.plan(rhs.shape, lhs.shape, numbers, "fp8_transform")
        return layout.exchange_sides(dot(rhs, lhs, numbers))


@dataclasses.dataclass(frozen=True)
class Moments:
    """A marked call that compares an operand with its codes: `(x, codes, scale)`."""

    quantize: Quantize

    def __call__(self, x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        return marked("moments", self._run)(x, data, scale)

    def _run(self, x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        operand = self.quantize.operand
        x = operand.arrange(x)
        x = x if operand.contraction == 1 else x.mT
        return moments(x, QTensor(data, scale, self.quantize.spec.tile))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A marked call that puts the moments of a product's two operands together.

    Attributes:
        first: the operand that a recipe counts first.
    """

    first: Side

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return marked("statistics", self._run)(lhs, rhs)

    def _run(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.stack([lhs, rhs] if self.first == "lhs" else [rhs, lhs])


@dataclasses.dataclass(frozen=True)
class Collect:
    """A marked call that has moments collected: `Statistics` made elsewhere."""

    def __call__(self, pair: jax.Array) -> jax.Array:
        return marked("statistics", self._run)(pair)

    def _run(self, pair: jax.Array) -> jax.Array:
        return pair


@dataclasses.dataclass(frozen=True)
class Measure:
    """`Statistics` of the operands of a product that is one call: `(lhs, rhs)`.

    They are quantized for this alone.
    """

    quantize: tuple[Quantize, Quantize]
    first: Side

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return marked("statistics", self._run)(lhs, rhs)

    def _run(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        found = []
        for x, quantize in zip((lhs, rhs), self.quantize, strict=True):
            x = jax.lax.stop_gradient(x)
            found.append(Moments(quantize)(x, *quantize(x)))
        return Statistics(self.first)(*found)


COLLECTED = Statistics, Collect, Measure  # Calls whose results are collected.
MAKING_CODES = (
    Quantize,
    QuantizeBoth,
    QuantizeMap,
)  # Calls whose results are codes and scales.
