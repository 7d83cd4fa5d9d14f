"""Products by weights stored in FP8, of activations that are quantized online.

Their inputs have gradients, by the same codes; the weights have none.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fp8jax import numerics
from fp8jax.matmul import scaled_matmul, swiglu_matmul
from fp8jax.ops._explicit import summed_product, typed_as
from fp8jax.ops._gemm import INPUT_DTYPES
from fp8jax.ops._rms_norm import rms_norm
from fp8jax.ops._static_gradient import with_input_gradient
from fp8jax.ops._static_split import over_devices
from fp8jax.ops._swiglu import activation
from fp8jax.quant import QTensor, QuantSpec, quantize, quantize_rms_norm
from fp8jax.recipes import Recipe, recipe_or_default


def static_weight_dot(
    name: str,
    x: jax.Array | QTensor,
    kernel: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x [..., k]` times `kernel [k, n]`, whose codes stay as they are stored.

    `y = q(x) kernel`: x is quantized as the recipe's `fprop.lhs` says, the weight never
    inflated. An x that is a QTensor already serves several products with one
    quantization, or comes from a fused one.

    Args:
        name: of the caller, for errors.
        x: bfloat16, float16 or float32, or a QTensor with tiles of 128 along k.
        kernel: with tiles of 128 along k. On a GPU its codes should lie as
            `contraction_minor` lays them, or each call transposes them.
        out_dtype: bfloat16, float16 or float32.
        recipe: `recipes.deepseek_v3()` by default.
        implementation: as in `scaled_matmul`.

    Returns:
        `[..., n]` of `out_dtype`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the recipe has no FP8 fprop.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When codes are differentiated.

    The gradient is `dx = q(dy) kernelᵀ`, by the recipe's `dgrad.lhs` and the same
    codes, where the kernel has tiles of 128 along n and the recipe a dgrad in FP8; else
    of the dequantized kernel.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.
    """
    spec = activation_spec(name, x, out_dtype, recipe)
    dgrad = recipe_or_default(name, recipe).dgrad
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} takes x [..., k] and a kernel [k, n], got {x.shape} and "
            f"{kernel.shape}."
        )

    _check_rows(name, x)

    def plain(x: jax.Array | QTensor, kernel: QTensor) -> jax.Array:
        return summed_product(_values(x, out_dtype), _values(kernel, out_dtype))

    def product(x: jax.Array | QTensor, kernel: QTensor) -> jax.Array:
        return _split_dot(x, kernel, spec, np.dtype(out_dtype), implementation)

    def backward(arrays: Any, kernels: Any, dout: jax.Array) -> tuple[jax.Array]:
        (x,), (kernel,) = arrays, kernels
        if dgrad is None or kernel.tile[1] != spec.tile[1] or 0 in dout.shape:
            w = kernel.dequantize(dout.dtype)
            return (jax.numpy.matmul(dout, w.T).astype(x.dtype),)
        return (_split_dot(dout, kernel.T, dgrad.lhs, x.dtype, implementation),)

    return _of_codes(name, plain, product, backward, x, kernel)


def _split_dot(
    x: jax.Array | QTensor,
    kernel: QTensor,
    spec: QuantSpec,
    out_dtype: np.dtype,
    implementation: str | None,
) -> jax.Array:
    """`x [..., k]` times `kernel [k, n]`, split over devices where arrays may be."""
    lead = _lead(x)
    return over_devices(
        _dot,
        x,
        kernel,
        names=((*lead, "k"), ("k", "n")),
        results=((*lead, "n"),),
        summed=("k",),
        multiples={"k": spec.tile[1]},
        spec=spec,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def _dot(
    x: jax.Array | QTensor, kernel: QTensor, *, spec: QuantSpec, **how: Any
) -> jax.Array:
    q = _quantized(_rows(x), spec, how["implementation"])
    y = scaled_matmul(q, kernel.T, **how)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def static_weight_rms_norm(
    name: str,
    x: jax.Array,
    scale: jax.Array,
    *kernels: QTensor,
    epsilon: float,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    r"""$y_i = q(h) W_i$ with $h = x / rms(x) \odot scale$, of weights stored in FP8.

    h goes to FP8 as it is computed, once for all kernels: a kernel for it and one for
    each product.

    Args:
        name, out_dtype, recipe, implementation: as in `static_weight_dot`.
        x: `[..., k]`, bfloat16, float16 or float32.
        scale: `[k]` of any float dtype: the norm's weight.
        kernels: `[k, n_i]` each, as the kernel there.
        epsilon: added to the mean of squares.

    Returns:
        `[..., n_i]` of `out_dtype` for each kernel.

    Raises:
        ValueError, NotImplementedError, TypeError: As `static_weight_dot` does; x may
            not be a QTensor.

    The gradient is that of the norm and `static_weight_dot`s after it, computed again.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    if isinstance(x, QTensor):
        raise ValueError(f"{name} normalizes its input: an array, got a QTensor.")
    spec = activation_spec(name, x, out_dtype, recipe)
    side = x.shape[-1:]
    fits = all(isinstance(w, QTensor) and w.ndim == 2 for w in kernels)
    fits = fits and bool(side) and all(w.shape[:1] == side for w in kernels)
    if not fits or scale.shape != side:
        kinds = ", ".join(f"{kind_of(w)} {list(w.shape)}" for w in kernels)
        raise ValueError(
            f"{name} takes x [..., k], a norm's scale [k] and QTensors [k, n], got "
            f"{x.shape}, {scale.shape} and {kinds}."
        )

    lead = _lead(x)
    how: Any = {"out_dtype": np.dtype(out_dtype), "implementation": implementation}
    features = [f"n{i}" for i in range(len(kernels))]

    def products(
        x: jax.Array, scale: jax.Array, *kernels: QTensor
    ) -> tuple[jax.Array, ...]:
        return over_devices(
            _rms_norm_dots,
            x,
            scale,
            *kernels,
            names=((*lead, "k"), ("k",), *(("k", n) for n in features)),
            results=tuple((*lead, n) for n in features),
            whole=("k",),
            spec=spec,
            epsilon=epsilon,
            **how,
        )

    def plain(
        x: jax.Array, scale: jax.Array, *kernels: QTensor
    ) -> tuple[jax.Array, ...]:
        h = x * scale.astype(x.dtype)
        h = _values(h, out_dtype)
        return tuple(summed_product(h, _values(w, out_dtype)) for w in kernels)

    def unfused(kernels: Any, x: jax.Array, scale: jax.Array) -> tuple[Any, ...]:
        h = rms_norm(epsilon, x, scale)
        again: Any = {"recipe": recipe, **how}
        return tuple(static_weight_dot(name, h, w, **again) for w in kernels)

    backward = _gradient_of(unfused)
    return _of_codes(name, plain, products, backward, x, scale, *kernels)


def _gradient_of(unfused: Callable[..., Any]) -> Callable[..., Any]:
    """The backward half of what one kernel does, by `unfused(kernels, *arrays)`."""

    def backward(arrays: Any, kernels: Any, douts: Any) -> Any:
        _, vjp = jax.vjp(functools.partial(unfused, kernels), *arrays)
        return vjp(douts)

    return backward


def _rms_norm_dots(
    x: jax.Array,
    scale: jax.Array,
    *kernels: QTensor,
    spec: QuantSpec,
    epsilon: float,
    **how: Any,
) -> tuple[jax.Array, ...]:
    q, _ = quantize_rms_norm(
        x.reshape(-1, x.shape[-1]),
        scale,
        spec,
        epsilon=epsilon,
        implementation=how["implementation"],
    )
    ys = [scaled_matmul(q, kernel.T, **how) for kernel in kernels]
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in ys)


def static_weight_swiglu(
    name: str,
    x: jax.Array | QTensor,
    gate: QTensor,
    up: QTensor,
    down: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""A gated MLP, $(silu(x W_g) \odot (x W_u)) W_d$, of weights stored in FP8.

    x is quantized once for gate and up, and what lies between the products goes to FP8
    as it is computed: four kernels and a fifth for x; three in all for a few rows.

    Args:
        name, x, out_dtype, recipe, implementation: as in `static_weight_dot`.
        gate, up: `[k, hidden]`, as the kernel there.
        down: `[hidden, n]`, likewise.

    Returns:
        `[..., n]` of `out_dtype`, in which gate and up are rounded, too.

    Raises:
        ValueError, NotImplementedError, TypeError: As `static_weight_dot` does.

    The gradient is that of three `static_weight_dot`s and what lies between, computed
    again from x, which alone is kept.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    spec = activation_spec(name, x, out_dtype, recipe)
    kernels = (gate, up, down)
    fits = x.ndim >= 1 and all(isinstance(w, QTensor) and w.ndim == 2 for w in kernels)
    fits = fits and gate.shape == up.shape == (x.shape[-1], *down.shape[:1])
    if not fits:
        kinds = ", ".join(f"{kind_of(w)} {list(w.shape)}" for w in kernels)
        raise ValueError(
            f"{name} takes x [..., k] and, once one of them is a QTensor, QTensors "
            f"[k, hidden] twice and [hidden, n], got {x.shape} and {kinds}."
        )

    _check_rows(name, x)
    lead = _lead(x)
    how: Any = {"out_dtype": np.dtype(out_dtype), "implementation": implementation}

    def product(
        x: jax.Array | QTensor, gate: QTensor, up: QTensor, down: QTensor
    ) -> jax.Array:
        return over_devices(
            _gated,
            x,
            gate,
            up,
            down,
            names=((*lead, "k"), ("k", "h"), ("k", "h"), ("h", "n")),
            results=((*lead, "n"),),
            summed=("h",),
            whole=("k",),
            multiples={"h": spec.tile[1]},
            spec=spec,
            **how,
        )

    def plain(
        x: jax.Array | QTensor, gate: QTensor, up: QTensor, down: QTensor
    ) -> jax.Array:
        rows, *weights = (_values(v, out_dtype) for v in (x, gate, up, down))
        h = summed_product(rows, weights[0]) * summed_product(rows, weights[1])
        return summed_product(h, weights[2])

    def unfused(kernels: Any, x: jax.Array) -> jax.Array:
        again: Any = {"recipe": recipe, **how}
        gate, up = (static_weight_dot(name, x, w, **again) for w in kernels[:2])
        h = activation(gate, up)
        return static_weight_dot(name, h, kernels[2], **again)

    return _of_codes(name, plain, product, _gradient_of(unfused), x, *kernels)


def _gated(
    x: jax.Array | QTensor,
    gate: QTensor,
    up: QTensor,
    down: QTensor,
    *,
    spec: QuantSpec,
    out_dtype: np.dtype,
    implementation: str | None,
) -> jax.Array:
    how: Any = {"implementation": implementation}
    q_x = _quantized(_rows(x), spec, implementation)
    q_h = swiglu_matmul(q_x, gate.T, up.T, spec, dtype=out_dtype, **how)
    y = scaled_matmul(q_h, down.T, out_dtype=out_dtype, **how)
    return y.reshape(*x.shape[:-1], down.shape[1])


def check_quantized_input(name: str, x: Any, dtype: Any, *kernels: Any) -> None:
    """Raises ValueError, on behalf of a layer, if it cannot take x as a QTensor."""
    if isinstance(x, QTensor) and (
        dtype is None or not all(isinstance(w, QTensor) for w in kernels)
    ):
        kinds = ", ".join(map(kind_of, kernels))
        raise ValueError(
            f"{name} takes a QTensor as its input if its kernels are QTensors and it "
            f"has a dtype=, that of the output, got {kinds} and {dtype=}."
        )


def kind_of(x: Any) -> str:
    return "QTensor" if isinstance(x, QTensor) else "array"


def activation_spec(
    name: str,
    x: jax.Array | QTensor,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None,
) -> QuantSpec:
    """How activations are quantized; ValueError if a dtype or the recipe is not fit."""
    recipe = recipe_or_default(name, recipe)
    if recipe.fprop is None:
        raise ValueError(
            f"{name} with a QTensor kernel takes a recipe whose fprop is in FP8, got "
            f"{recipe}; dequantize the kernel for a product without."
        )
    is_float = isinstance(x, QTensor) or np.dtype(x.dtype) in INPUT_DTYPES
    if not is_float or np.dtype(out_dtype) not in INPUT_DTYPES:
        raise ValueError(
            f"{name} with a QTensor kernel takes and gives bfloat16, float16 or "
            f"float32, got {x.dtype} and {np.dtype(out_dtype)}."
        )
    return recipe.fprop.lhs


def _check_rows(name: str, x: jax.Array | QTensor) -> None:
    """Raises ValueError if the rows of `x [..., k]` are not those of one matrix."""
    if not isinstance(x, QTensor):
        return
    x.check(name)
    if x.tile[0] != 1 and x.ndim > 2:  # A tile would span two matrices.
        raise ValueError(
            f"{name} takes a QTensor of more than two dimensions in tiles of one row, "
            f"got {x.shape} in tiles of {x.tile}."
        )


def _rows(x: jax.Array | QTensor) -> jax.Array | QTensor:
    """`x [..., k]` as a matrix."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), x)


def _lead(x: jax.Array | QTensor) -> tuple[str, ...]:
    """Names of the dimensions before the last."""
    return tuple(f"m{i}" for i in range(x.ndim - 1))


def _values(x: jax.Array | QTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array of the shape and sharding of `x`."""
    return (x.data if isinstance(x, QTensor) else x).astype(dtype)


def _quantized(
    x: jax.Array | QTensor, spec: QuantSpec, implementation: str | None
) -> QTensor:
    if isinstance(x, QTensor):
        return x
    return quantize(x, spec, implementation=implementation)


def _of_codes(
    name: str,
    plain: Callable[..., Any],
    product: Callable[..., Any],
    backward: Callable[..., Any],
    *args: Any,
) -> Any:
    """`product(*args)`, of the type that `plain(*args)` has; codes have no derivative.

    Args:
        name: of the caller, for errors.
        plain: the same of dequantized operands. It also serves an x without elements,
            which no kernel takes.
        product: of codes.
        backward: its gradient of arrays, as in `with_input_gradient`.
        args: the activation, then what it meets.
    """
    run = plain if 0 in args[0].shape else product
    return typed_as(plain, with_input_gradient(name, run, backward), *args)


def without_derivative(name: str, product: Callable[..., Any]) -> Callable[..., Any]:
    """`product` of arrays, part of one by QTensors; TypeError if differentiated."""
    return numerics.refuse_derivatives(
        product,
        f"{name} with a QTensor kernel has no gradient here: it is for inference. To "
        "train adapters beside a frozen QTensor, apply fp8_transform to the whole step "
        "that holds jax.grad, or take fp8jax.nnx.Linear or fp8jax.linen.Dense; else "
        "train with an array as the kernel.",
    )
