"""What one product becomes: data alone; `lower` has the operations."""

import dataclasses

from fp8jax.quant import QuantSpec
from fp8jax.recipes import Recipe
from fp8jax.transform.analysis import Role, Side, Stored, other_side


@dataclasses.dataclass(frozen=True)
class QuantizedDot:
    """One product in FP8, in a function that holds its own backward pass."""

    role: Role
    lhs_spec: QuantSpec
    rhs_spec: QuantSpec
    implementation: str | None
    first: Side  # The operand that the recipe counts first.
    split: bool = False  # Whether XLA may split it over devices.
    alone: bool = False  # Whether it then quantizes for itself.
    early: bool = False  # Whether wgrad's codes of x are made in the forward pass.


@dataclasses.dataclass(frozen=True)
class LayerDot:
    """A forward product whose gradients follow the recipe as well."""

    recipe: Recipe
    weight: Side
    implementation: str | None
    split: bool = False  # Whether XLA may split it over devices.

    @property
    def first(self) -> Side:
        """The operand that the recipe counts first."""
        return other_side(self.weight)


@dataclasses.dataclass(frozen=True)
class StoredDot:
    """A product of an activation, quantized online, and a stored weight.

    Attributes:
        weight: which operand is stored.
        stored: the weight.
        recipe: of the activation, in FP8.
        contraction: dimension of the operand, 0 or 1, that is contracted.
        implementation: as in `fp8jax.dot_general`.
        split: whether XLA may split it over devices.
    """

    weight: Side
    stored: Stored
    recipe: Recipe
    contraction: int
    implementation: str | None
    split: bool = False

    @property
    def first(self) -> Side:
        """The operand that the recipe counts first."""
        return other_side(self.weight)

    @property
    def spec(self) -> QuantSpec:
        """The activation's spec, `[free, contraction]`."""
        assert self.recipe.fprop is not None
        return self.recipe.fprop.lhs

    @property
    def specs(self) -> tuple[QuantSpec, QuantSpec]:
        """The specs of lhs and rhs, `[free, contraction]`."""
        rows, columns = self.stored.operand_tile
        tile = (rows, columns) if self.contraction == 1 else (columns, rows)
        stored = QuantSpec(tile=tile, dtype=self.stored.data.aval.dtype, scale="fp32")
        pair = (self.spec, stored)
        return pair if self.weight == "rhs" else (stored, self.spec)


Decision = QuantizedDot | LayerDot | StoredDot


def specs_of(replacement: Decision | None) -> tuple[QuantSpec, ...]:
    """The specs of both operands, if the product itself is in FP8; else ()."""
    if isinstance(replacement, StoredDot):
        return replacement.specs
    if isinstance(replacement, QuantizedDot):
        return replacement.lhs_spec, replacement.rhs_spec
    if isinstance(replacement, LayerDot) and replacement.recipe.fprop is not None:
        gemm = replacement.recipe.fprop
        first = replacement.first == "lhs"
        return (gemm.lhs, gemm.rhs) if first else (gemm.rhs, gemm.lhs)
    return ()
