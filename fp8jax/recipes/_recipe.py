"""Which numbers each of a layer's three GEMMs is computed in."""

import dataclasses
from typing import Literal, get_args

from fp8jax.quant import QuantSpec

Residual = Literal["bf16", "fp8", "recompute"]

_CONTRACTION_TILE = 128


@dataclasses.dataclass(frozen=True)
class GemmSpec:
    """How the two operands of one GEMM are quantized.

    Tiles are written for operands with the contraction last, `[free, contraction]`: a
    `(1, 128)` tile holds 128 numbers that are multiplied and added.

    Attributes:
        lhs: the first operand's spec.
        rhs: the second operand's spec.

    Raises:
        ValueError: If a tile does not span 128 of the contraction.
    """

    lhs: QuantSpec
    rhs: QuantSpec

    def __post_init__(self):
        for name, spec in (("lhs", self.lhs), ("rhs", self.rhs)):
            if not isinstance(spec, QuantSpec):
                raise ValueError(f"GemmSpec takes QuantSpecs, got {name}={spec!r}.")
            if spec.tile[1] != _CONTRACTION_TILE:
                raise ValueError(
                    "GemmSpec takes tiles of 128 along the contraction, which is last, "
                    f"got {name}.tile={spec.tile}."
                )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A dense layer's `y = x W` and its gradients. Hashable.

    | GEMM | lhs | rhs | contraction |
    |---|---|---|---|
    | fprop `y = x W` | x | W | in-channels |
    | dgrad `dx = dy Wᵀ` | dy | W | out-channels |
    | wgrad `dW = xᵀ dy` | x | dy | tokens |

    Attributes:
        fprop: the forward product; None keeps it in its operands' own dtype.
        dgrad: the gradient of the input; likewise.
        wgrad: the gradient of the weight; likewise.
        residual: what the forward pass keeps of `x` and `W`: `"bf16"`, the arrays as
            they came, quantized the other way in the backward pass; or `"fp8"`, the
            codes that wgrad and dgrad will read, made by the read of `x` and `W` that
            makes the forward pass's: half the bytes and the same bits (of products
            split over devices, with power-of-two scales only), at the cost of an array
            of codes more where `x` is kept for something else anyway. `"recompute"` is
            for blocks of several products: the block's input as it came and nothing
            between them, which the backward pass computes again; of one product, and in
            `fp8_transform`, it is `"bf16"`.

    Raises:
        ValueError: If gradients have 128x128 tiles, or `"fp8"` residuals have a GEMM
            that needs `x` or `W` unquantized.
    """

    fprop: GemmSpec | None
    dgrad: GemmSpec | None
    wgrad: GemmSpec | None
    residual: Residual = "bf16"

    def __post_init__(self):
        for name in ("fprop", "dgrad", "wgrad"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, GemmSpec):
                raise ValueError(f"Recipe takes GemmSpec or None, got {name}={spec!r}.")
        if self.residual not in get_args(Residual):
            raise ValueError(
                f"Recipe takes a residual of {get_args(Residual)}, got "
                f"{self.residual!r}."
            )
        gradients = {
            "dgrad.lhs": self.dgrad and self.dgrad.lhs,
            "wgrad.rhs": self.wgrad and self.wgrad.rhs,
        }
        for name, spec in gradients.items():
            if spec is not None and spec.tile[0] > 1:
                raise ValueError(
                    f"Recipe takes (1, 128) tiles for gradients, got {name}.tile="
                    f"{spec.tile}: with 128x128 tiles training diverged (DeepSeek-V3 "
                    "Technical Report, appendix B.2)."
                )
        if self.residual == "fp8" and None in (self.fprop, self.dgrad, self.wgrad):
            raise ValueError(
                "Recipe with residual='fp8' keeps no unquantized operand, so it takes "
                "all three GEMMs in FP8; got one that is None."
            )

    @property
    def is_off(self) -> bool:
        """Whether no GEMM is in FP8."""
        return self.fprop is None and self.dgrad is None and self.wgrad is None
