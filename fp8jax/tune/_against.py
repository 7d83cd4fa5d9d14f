"""A dense layer's three products in FP8, every quantization included, over BF16's."""

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.ops import dot_general
from fp8jax.recipes import Recipe, bf16
from fp8jax.tune._clock import kernels_of

_ITERATIONS = 5  # Calls in one turn.


@dataclasses.dataclass(frozen=True)
class Against:
    """Kernel times of one layer's output and both gradients, in microseconds.

    Attributes:
        tokens, outputs, inputs: of the layer: M, N and K of its fprop.
        bf16_us: all in BF16.
        gemm_us: the products in FP8.
        other_us: what FP8 takes besides: x, the output's gradient and the weight are
            quantized for all products that read them.
    """

    tokens: int
    outputs: int
    inputs: int
    bf16_us: float
    gemm_us: float
    other_us: float

    @property
    def speed(self) -> float:
        """How many times BF16's."""
        return self.bf16_us / (self.gemm_us + self.other_us)

    def __str__(self) -> str:
        pays = "pays" if self.speed > 1 else "does not pay"
        return (
            f"[{self.tokens}, {self.inputs}] x [{self.inputs}, {self.outputs}] and "
            f"both gradients: BF16 {self.bf16_us:.1f} us; FP8 "
            f"{self.gemm_us + self.other_us:.1f} us, of which products "
            f"{self.gemm_us:.1f}, quantization {self.other_us:.1f}. "
            f"{self.speed:.2f} times BF16's speed: FP8 {pays} here."
        )


def against_bf16(
    tokens: int, outputs: int, inputs: int, recipe: Recipe, *, rounds: int = 5
) -> Against:
    """Times a layer by itself on the GPU present, in turns with the one in BF16.

    In a model it may do better: layers that read one x share its codes, and norms and
    activations before it quantize what they compute.

    Args:
        tokens, outputs, inputs: of the layer.
        recipe: of its products in FP8.
        rounds: turns of each, of five calls.
    """
    arrays = layer_arrays(tokens, inputs, outputs)
    layers = {"bf16": dense_layer(bf16()), "fp8": dense_layer(recipe)}
    turns: dict[str, list[list[tuple[str, float]]]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            turns[name] += kernels_of(layer, *arrays, iterations=_ITERATIONS)

    def median(name: str, multiplies: bool | None = None) -> float:
        return statistics.median(
            sum(us for kernel, us in call if multiplies in (None, _is_gemm(kernel)))
            for call in turns[name]
        )

    return Against(
        tokens,
        outputs,
        inputs,
        bf16_us=median("bf16"),
        gemm_us=median("fp8", multiplies=True),
        other_us=median("fp8", multiplies=False),
    )


def dense_layer(recipe: Recipe) -> Any:
    """Jitted: output, and gradients with respect to x and w, for a given cotangent."""
    dimensions = (((1,), (0,)), ((), ()))
    dot = functools.partial(dot_general, dimension_numbers=dimensions, recipe=recipe)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(dot, x, w)
        return out, *vjp(dout)

    return run


def layer_arrays(tokens: int, inputs: int, outputs: int) -> tuple[jax.Array, ...]:
    """Random x [tokens, inputs], W [inputs, outputs] and dy [tokens, outputs]."""
    keys = jax.random.split(jax.random.key(tokens + inputs + outputs), 3)
    shapes = ((tokens, inputs), (inputs, outputs), (tokens, outputs))
    scales = (1.0, inputs**-0.5, 1.0)
    return tuple(
        (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    )


def _is_gemm(kernel: str) -> bool:
    # A product that our kernel does not make is XLA's, by one library or another.
    return any(word in kernel for word in ("gemm", "nvjet", "cutlass"))
