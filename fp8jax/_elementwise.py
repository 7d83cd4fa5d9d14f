"""Elementwise functions as data: hashable, and evaluated by any lowering."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Kind: TypeAlias = Literal["matrix", "rows", "columns"]
Function: TypeAlias = Callable[..., jax.Array]

# By the names of JAX's primitives. All give results of their operands' dtype, but for
# comparisons and "convert_element_type".
FUNCTIONS: Mapping[str, Function] = {
    "abs": lax.abs,
    "add": lax.add,
    "add_any": lax.add,
    "convert_element_type": lambda x: x,  # The dtype of the step says to which.
    "copy": lambda x: x,
    "div": lax.div,
    "eq": lax.eq,
    "exp": lax.exp,
    "exp2": lax.exp2,
    "ge": lax.ge,
    "gt": lax.gt,
    "le": lax.le,
    "log": lax.log,
    "logistic": lax.logistic,
    "lt": lax.lt,
    "max": lax.max,
    "min": lax.min,
    "mul": lax.mul,
    "ne": lax.ne,
    "neg": lax.neg,
    "rsqrt": lax.rsqrt,
    "select_n": lax.select_n,
    "sqrt": lax.sqrt,
    "square": lax.square,
    "sub": lax.sub,
    "tanh": lax.tanh,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of an elementwise function.

    Attributes:
        name: a key of `FUNCTIONS`, or "integer_pow".
        operands: for each, the number of a value, or a constant of its own dtype.
        dtype: of the result.
        power: of "integer_pow".
    """

    name: str
    operands: tuple[int | np.generic, ...]
    dtype: np.dtype
    power: int | None = None


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A function of matrices [m, k], numbers per row [m, 1] and per column [1, k].

    Attributes:
        kinds: of its inputs: all matrices first, at least one.
        dtypes: of its inputs.
        steps: in order. Values are numbered: inputs first, then results of steps.
        results: numbers of the values that it gives, each of a step.
    """

    kinds: tuple[Kind, ...]
    dtypes: tuple[np.dtype, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]

    @property
    def result_dtypes(self) -> tuple[np.dtype, ...]:
        return tuple(
            self.steps[number - len(self.kinds)].dtype for number in self.results
        )

    def shapes(self, m: int, k: int) -> list[tuple[int, int]]:
        """Of its inputs, where the matrices are [m, k]."""
        by_kind = {"matrix": (m, k), "rows": (m, 1), "columns": (1, k)}
        return [by_kind[kind] for kind in self.kinds]

    def arranged(
        self, inputs: Sequence[jax.Array], shape: tuple[int, ...]
    ) -> list[jax.Array]:
        """Inputs of any ranks as those of matrices of a shape.

        Args:
            inputs: matrices with all dimensions, numbers per row or column with any of
                their own, scalars.
            shape: [m, k]; of a batch [*batch, m, k], of matrices alone.
        """
        *batch, m, k = shape
        return [
            jnp.broadcast_to(x, one) if x.ndim == 0 else x.reshape(*batch, *one)
            for x, one in zip(inputs, self.shapes(m, k), strict=True)
        ]

    def __call__(
        self, *inputs: jax.Array, functions: Mapping[str, Function] = FUNCTIONS
    ) -> tuple[jax.Array, ...]:
        """The results, each rounded to its dtype at every step.

        Args:
            inputs: as `kinds` says, or pieces of them, of one shape.
            functions: what stands for each name.
        """
        values: list[Any] = list(inputs)
        for step in self.steps:
            operands = [
                values[x] if isinstance(x, int) else jnp.asarray(x)
                for x in step.operands
            ]
            if step.power is not None:
                result = lax.integer_pow(operands[0], step.power)
            else:
                result = functions[step.name](*_of_one_shape(operands))
            values.append(result.astype(step.dtype))
        return tuple(values[number] for number in self.results)


def _of_one_shape(operands: list[jax.Array]) -> list[jax.Array]:
    shape = jnp.broadcast_shapes(*(x.shape for x in operands))
    return [jnp.broadcast_to(x, shape) for x in operands]
