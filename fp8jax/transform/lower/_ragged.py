"""`jax.lax.ragged_dot` and its two gradients: what they are, and what replaces them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from fp8jax import ops
from fp8jax.ops import marked
from fp8jax.transform.analysis import ragged_of
from fp8jax.transform.ir import aval_of, product_options
from fp8jax.transform.plan import LayerDot, QuantizedDot


def ragged_call(
    eqn: JaxprEqn, what: QuantizedDot | LayerDot
) -> "RaggedProduct | RaggedLayer":
    """The marked call that stands in for the product, of its operands."""
    if isinstance(what, LayerDot):
        return RaggedLayer(what, *product_options(eqn))
    ragged = ragged_of(eqn)
    assert ragged is not None, "others are left as they are"
    return RaggedProduct(what, ragged.form, np.dtype(aval_of(eqn.outvars[0]).dtype))


@dataclasses.dataclass(frozen=True)
class RaggedProduct:
    """A marked call that quantizes and multiplies: `(lhs, rhs, group_sizes)`."""

    what: QuantizedDot
    form: ops.RaggedForm
    out_dtype: np.dtype

    def __call__(self, *operands: jax.Array) -> jax.Array:
        return marked(self.what.role, self._run)(*operands)

    def _run(self, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return ops.quantized_ragged_dot(
            lhs,
            rhs,
            sizes,
            self.form,
            self.what.lhs_spec,
            self.what.rhs_spec,
            out_dtype=self.out_dtype,
            implementation=self.what.implementation,
        )


@dataclasses.dataclass(frozen=True)
class RaggedLayer:
    """A marked call of `ops.ragged_dot`."""

    what: LayerDot
    precision: Any
    preferred_element_type: Any

    def __call__(self, *operands: jax.Array) -> jax.Array:
        return marked("ragged_dot", self._run)(*operands)

    def _run(self, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return ops.ragged_dot(
            lhs,
            rhs,
            sizes,
            self.precision,
            self.preferred_element_type,
            recipe=self.what.recipe,
            implementation=self.what.implementation,
        )
