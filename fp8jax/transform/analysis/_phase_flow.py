"""Tells a recomputation from a gradient by what it reads, where names do not.

Names do not tell the linear part of a `custom_jvp` rule, transposed, from a function
that a `custom_vjp` rule differentiates again; nor, in a rule written by hand, what it
computes again from what it makes of a cotangent. Values do: all that JAX transposes
reads a cotangent, and no recomputation does.
"""

from collections.abc import Sequence

from fp8jax.transform.analysis._phases import Phase
from fp8jax.transform.analysis._values import Value


class PhasesByFlow:
    """Told one equation after another, in the program's order.

    Attributes:
        overrules: whether something that names call backward was none.
    """

    def __init__(self, trusts_names: bool = False) -> None:
        """
        Args:
            trusts_names: whether what names call backward is so, whatever it reads.
        """
        self._trusts_names = trusts_names
        self.overrules = False
        self._leaves = 0  # `Value.leaves` that forward passes read as they came.
        self._has_seed = False  # Whether the backward pass has begun.

    def of(self, phase: Phase, operands: Sequence[Value]) -> Phase:
        """The pass of an equation.

        Args:
            phase: by its names.
            operands: that it reads.
        """
        if phase == "forward":
            self._has_seed = False
            for x in operands:
                self._leaves |= x.leaves if x.only_leaf is not None else 0
        elif phase == "backward":
            # The first one reads the cotangent that all others come of.
            is_told = self._has_seed and not self._trusts_names
            if is_told and all(map(self._is_residual, operands)):
                self.overrules = True
                return "recompute"
            self._has_seed = True
        elif phase == "recompute" and any(x.cotangent for x in operands):
            return "backward"
        return phase

    def _is_residual(self, x: Value) -> bool:
        is_known = x.only_leaf is not None and not x.leaves & ~self._leaves
        return x.residual or is_known
