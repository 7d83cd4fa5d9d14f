"""A mixture of experts in inference: activations quantized online, weights in FP8."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.matmul import grouped_matmul
from fp8jax.ops._explicit import refuse_explicit
from fp8jax.ops._spread import Spread, spread, without_split
from fp8jax.ops._static_gradient import with_input_gradient
from fp8jax.ops._static_weight import activation_spec, kind_of
from fp8jax.ops._swiglu import activation
from fp8jax.quant import QTensor, quantize, quantize_swiglu
from fp8jax.recipes import Recipe, recipe_or_default


def static_weight_experts(
    name: str,
    x: jax.Array,
    gate: QTensor,
    up: QTensor,
    down: QTensor,
    group_sizes: jax.Array,
    *,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""`expert_mlp` of weights stored in FP8: $(silu(x_e G_e) \odot (x_e U_e)) D_e$.

    As `static_weight_swiglu` does, x is quantized once for gate and up, and h goes to
    FP8 as it is computed: three grouped GEMMs, and the bits of an `expert_mlp` that
    finds these codes itself.

    Args:
        name: of the caller, for errors.
        x: `[rows, k]`, bfloat16, float16 or float32, the first expert's rows first.
        gate, up: `[experts, k, hidden]` with tiles of 128 along k. On a GPU their codes
            should lie as `contraction_minor` lays them, or each call transposes them.
        down: `[experts, hidden, n]`, likewise.
        group_sizes: integers `[experts]`; their sum is at most all rows.
        recipe: `recipes.deepseek_v3()` by default; its `fprop.lhs` counts.
        implementation: as in `grouped_matmul`.

    Returns:
        `[rows, n]` in the dtype of x; zero in rows of no expert.

    Raises:
        ValueError: If shapes, tiles or dtypes do not fit, some weights are codes and
            some are not, or the recipe has no FP8 fprop.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When codes are differentiated.

    The gradient of x is that of an `expert_mlp` of arrays: h's by `q(dy_e) D_eᵀ`, and
    so on, by the recipe's `dgrad.lhs` and the same codes, where weights have tiles of
    128 along both sides; else of the dequantized weights. Nothing but x is kept: gate
    and up are computed again.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, sections 2.1.2 and 3.3.
    """
    spec = activation_spec(name, x, x.dtype, recipe)
    dgrad = recipe_or_default(name, recipe).dgrad
    kernels = gate, up, down
    sizes = jnp.shape(group_sizes), jnp.result_type(group_sizes)
    fits = (
        x.ndim == 2
        and all(isinstance(w, QTensor) and w.ndim == 3 for w in kernels)
        and gate.shape == up.shape == (len(gate.data), x.shape[1], down.shape[1])
        and sizes[0] == gate.shape[:1] == down.shape[:1]
        and jnp.issubdtype(sizes[1], jnp.integer)
    )
    if not fits:
        kinds = ", ".join(f"{kind_of(w)} {list(w.shape)}" for w in kernels)
        raise ValueError(
            f"{name} takes x [rows, k], once one weight is a QTensor, QTensors "
            "[experts, k, hidden] twice and [experts, hidden, n], and integer "
            f"group_sizes [experts], got {list(x.shape)}, {kinds} and "
            f"{sizes[1]}{list(sizes[0])}."
        )
    arrays = x, kernels, group_sizes
    refuse_explicit(name, *arrays)
    # Under a trace types do not tell, and weights are served on one device most often.
    if spread(*jax.tree.leaves(arrays)) == Spread.MANY:
        implementation = without_split(name, implementation, *arrays)
    how: Any = {"implementation": implementation}

    def multiply(q: QTensor, kernel: QTensor, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(q, kernel.T, sizes, out_dtype=x.dtype, **how)

    def into(x: jax.Array, gate: QTensor, up: QTensor, sizes: jax.Array) -> Any:
        q_x = quantize(x, spec, **how)
        return multiply(q_x, gate, sizes), multiply(q_x, up, sizes)

    def product(
        x: jax.Array, sizes: jax.Array, gate: QTensor, up: QTensor, down: QTensor
    ) -> jax.Array:
        if not x.size:
            return jnp.zeros((x.shape[0], down.shape[2]), x.dtype)
        of_gate, of_up = into(x, gate, up, sizes)
        q_h, _ = quantize_swiglu(of_gate, of_up, spec, None, **how)
        assert q_h is not None
        return multiply(q_h, down, sizes)

    def transposed(dout: jax.Array, kernel: QTensor, sizes: jax.Array) -> jax.Array:
        if dgrad is None or kernel.tile[1] != spec.tile[1]:
            w = kernel.dequantize(dout.dtype).mT
            return lax.ragged_dot(dout, w, sizes)
        q = quantize(dout, dgrad.lhs, **how)
        return grouped_matmul(q, kernel, sizes, out_dtype=dout.dtype, **how)

    def backward(arrays: Any, kernels: Any, dout: jax.Array) -> tuple[Any, None]:
        (x, sizes), (gate, up, down) = arrays, kernels
        if not x.size:
            return jnp.zeros_like(x), None
        _, gradient = jax.vjp(activation, *into(x, gate, up, sizes))
        dgate, dup = gradient(transposed(dout, down, sizes))
        return transposed(dgate, gate, sizes) + transposed(dup, up, sizes), None

    run = with_input_gradient(name, product, backward)
    return run(x, group_sizes.astype(jnp.int32), *kernels)
