"""How many bytes does a decoder block keep for its backward pass, by recipe and policy?

    python -m benchmarks.activations

Bytes a token of what `jax.vjp` of an NNX block keeps, without its weights, by XLA's
`memory_analysis`: the inputs of its four attention projections, its SwiGLU, and all of
it, without and with `jax.checkpoint`. Shapes are those of a 7B model; nothing runs, so
any device will do. Writes benchmarks/results/activations.csv.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import fp8jax.nnx
from benchmarks import _harness
from fp8jax import checkpoint_policies, recipes

FEATURES, HIDDEN, HEADS = 4096, 14336, 32
TOKENS = 128  # Of a sequence.
BASE = "bf16()"
RECIPES = {
    BASE: recipes.bf16(),
    'residual="bf16"': recipes.deepseek_v3(),
    'residual="fp8"': recipes.deepseek_v3(residual="fp8"),
    'residual="recompute"': recipes.deepseek_v3(residual="recompute"),
}
POLICIES = {
    "none": None,
    "products_saveable": checkpoint_policies.products_saveable,
    "weight_codes_saveable": checkpoint_policies.weight_codes_saveable,
    "codes_saveable": checkpoint_policies.codes_saveable,
    "products_and_codes_saveable": checkpoint_policies.products_and_codes_saveable,
}


class Projections(nnx.Module):
    """Linear layers of as many features as attention's, one after the other."""

    def __init__(self, recipe: recipes.Recipe, options: Mapping[str, Any]) -> None:
        self.layers = nnx.List(
            fp8jax.nnx.Linear(
                FEATURES, FEATURES, use_bias=False, recipe=recipe, **options
            )
            for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nnx.Module):
    """Attention and a gated MLP, a norm before each."""

    def __init__(self, recipe: recipes.Recipe, options: Mapping[str, Any]) -> None:
        self.norms = nnx.List(nnx.RMSNorm(FEATURES, **options) for _ in range(2))
        self.attention = fp8jax.nnx.MultiHeadAttention(
            HEADS, FEATURES, use_bias=False, decode=False, recipe=recipe, **options
        )
        self.mlp = swiglu(recipe, options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def swiglu(recipe: recipes.Recipe, options: Mapping[str, Any]) -> nnx.Module:
    return fp8jax.nnx.SwiGLU(FEATURES, HIDDEN, recipe=recipe, **options)


PARTS: dict[str, Callable[..., Any]] = {
    "inputs of q, k, v and o": Projections,
    "SwiGLU": swiglu,
    "block": Block,
}


def main() -> None:
    options = _harness.options_parser(__doc__).parse_args()
    cases = [(part, name, "") for part in PARTS for name in RECIPES]
    cases += [("block", 'residual="fp8"', policy) for policy in POLICIES]
    kept: dict[tuple[str, str, str], float] = {}
    rows = []
    for case in cases:
        part, name, policy = case
        kept[case] = _kept(PARTS[part], RECIPES[name], policy)
        of_bf16 = kept[case] / kept[part, BASE, ""]
        title = f"{part}, {name}" + (f", jax.checkpoint {policy}" if policy else "")
        print(f"{title:72} {kept[case]:>9,.0f} {of_bf16:6.1%}", flush=True)
        rows.append(
            {
                "part": part,
                "recipe": name,
                "checkpoint": policy,
                "bytes_a_token": f"{kept[case]:.0f}",
                "of_bf16": f"{of_bf16:.3f}",
            }
        )
    print(f"wrote {_harness.write_csv('activations', rows, options.commit)}")


def kept_bytes_a_token(fn: Callable[..., Any], features: int, *weights: Any) -> float:
    """Of what `jax.vjp` of `fn(x, *weights)` keeps, and no weight, by its program.

    Args:
        fn: of x bfloat16 `[tokens, features]`, compiled for 128 tokens and for 256.
        features: of x.
        weights: pytrees of arrays or their shapes.
    """

    def kept(tokens: int) -> int:
        x = jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16)
        lowered = jax.jit(lambda *args: jax.vjp(fn, *args)[1]).lower(x, *weights)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.output_size_in_bytes

    # Weights and their codes are in both.
    return (kept(2 * TOKENS) - kept(TOKENS)) / TOKENS


def _kept(build: Callable[..., Any], recipe: recipes.Recipe, policy: str) -> float:
    """By a module, under `jax.checkpoint` if a policy is named."""
    how = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    module = nnx.eval_shape(lambda: build(recipe, {**how, "rngs": nnx.Rngs(0)}))
    graph, state = nnx.split(module)

    def apply(x: jax.Array, state: Any) -> jax.Array:
        return nnx.merge(graph, state)(x.reshape(-1, TOKENS, FEATURES))

    if policy:
        apply = jax.checkpoint(apply, policy=POLICIES[policy])
    return kept_bytes_a_token(apply, FEATURES, state)


if __name__ == "__main__":
    main()
