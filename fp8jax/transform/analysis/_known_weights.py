"""Which values are weights: parameters, and what the step itself made of parameters."""

import dataclasses
from collections.abc import Sequence

from fp8jax.transform.analysis._gradients import operands_of
from fp8jax.transform.analysis._values import Dot, Value, other_side


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters among a function's leaves.

    Attributes:
        mask: `Value.leaves` of them.
        data: `Value.leaves` of what is known to be no mask, scale or state beside them.
        sizes: elements of each leaf.
    """

    mask: int
    data: int
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls, mask: int, dots: Sequence[Dot], sizes: Sequence[int], keys: int
    ) -> "Parameters":
        """
        Args:
            mask: `Value.leaves` of the parameters.
            dots: of the whole function.
            sizes: elements of each leaf.
            keys: `Value.leaves` of the state of random number generators.
        """
        scalars = sum(1 << i for i, size in enumerate(sizes) if size <= 1)
        return cls(mask, _data(dots, mask) & ~(mask | scalars | keys), tuple(sizes))

    def is_closed_over(self, x: Value) -> bool:
        """Whether a value depends on arrays that are no arguments, and on no other."""
        return x.leaves == 1 << len(self.sizes) and not x.cotangent

    def is_pure(self, x: Value) -> bool:
        """Whether a value depends on parameters alone."""
        return x.leaves != 0 and not x.leaves & ~self.mask and not x.cotangent

    def is_derived(self, x: Value) -> bool:
        """Whether it is a version of a parameter: data is in it by gradients alone."""
        made_of = x.versions | x.others
        with_data = x.others & ~self.mask or x.leaves & self.data
        return bool(made_of & self.mask) and not with_data and not x.cotangent

    def layers(self, x: Value) -> tuple[int, ...]:
        """The leaves that a weight is known by: several if they lie side by side."""
        of_arguments = (1 << len(self.sizes)) - 1
        made_of = (x.versions | x.others or x.leaves) & of_arguments
        parts = x.versions & self.mask
        if x.parts and parts.bit_count() > 1:
            return _members(parts)
        # A frozen matrix with trained ones added is known by the first.
        largest = max(
            _members(made_of), key=lambda i: (self.sizes[i], self.mask >> i & 1)
        )
        return (largest,)


def _data(dots: Sequence[Dot], mask: int) -> int:
    """Leaves that go into what parameters themselves are multiplied by."""
    found = 0
    parameters = Parameters(mask, 0, ())
    for dot, side in operands_of(dots):
        x, weight = dot.operand(side), dot.operand(other_side(side))
        is_forward = dot.scope.phase in ("forward", "recompute")
        # One row is a vector of a norm's, not a batch of tokens.
        if is_forward and parameters.is_pure(weight) and dot.free(side) > 1:
            found |= 0 if x.product or x.cotangent else x.leaves
    return found


def _members(leaves: int) -> tuple[int, ...]:
    return tuple(i for i in range(leaves.bit_length()) if leaves >> i & 1)
