"""From which width on does FP8 pay? A train step of blocks, over the same in BF16.

    python -m benchmarks.narrow [--widths 768 1024] [--tokens 16384] [--seconds 120]
        [--square-in-bf16]

A scan over blocks of a decoder without the attention between q, k, v and o: products,
norms, SwiGLU, every quantization, and an update of float32 weights by their gradients.
With --square-in-bf16 q, k, v and o stay in BF16: they have the fewest FLOPs a byte.
What `--seconds` leave no time for is left out, last rows first. Writes
benchmarks/results/narrow.csv.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

import fp8jax
from benchmarks import _harness
from benchmarks.layer import RECIPES
from fp8jax.recipes import Rule

WIDTHS = (512, 768, 1024, 1536, 2048)
TOKENS = (16384, 4096, 8192, 32768)
LAYERS = 4
HIDDEN = 4  # Of a block, in widths.
BASE = "jax bf16"


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="deepseek_v3")
    parser.add_argument("--square-in-bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="at most, about")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    print(f"{'tokens':>7}{'width':>7}{'BF16 us':>10}{'FP8 us':>10}{'speed':>7}")
    rules = [Rule("[qkvo]", None)] if options.square_in_bf16 else []
    rows = []
    for tokens in options.tokens:
        for width in options.widths:
            if time.monotonic() < end:
                row = _row(tokens, width, options.recipe, rules, options.rounds)
                rows.append(row)
    print(f"wrote {_harness.write_csv('narrow', rows, options.commit)}")


def _row(
    tokens: int, width: int, recipe: str, rules: list[Rule], rounds: int
) -> dict[str, Any]:
    params, x = jax.jit(_arrays, static_argnums=(0, 1))(tokens, width)
    fp8 = fp8jax.fp8_transform(jax.jit(_step), RECIPES[recipe], rules=rules)
    steps = {BASE: jax.jit(_step), recipe: fp8}
    launches = {name: functools.partial(f, params, x) for name, f in steps.items()}
    us = _harness.alternate(launches, launches=10, rounds=rounds)
    speed = us[BASE] / us[recipe]
    print(
        f"{tokens:7}{width:7}{us[BASE]:10.0f}{us[recipe]:10.0f}{speed:7.2f}", flush=True
    )
    return {
        "tokens": tokens,
        "width": width,
        "layers": LAYERS,
        "recipe": recipe,
        "square_in_bf16": int(bool(rules)),
        "bf16_us": f"{us[BASE]:.0f}",
        "fp8_us": f"{us[recipe]:.0f}",
        "speed": f"{speed:.3f}",
    }


def _arrays(tokens: int, width: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Stacked weights in float32, and activations in bfloat16."""
    hidden = HIDDEN * width
    shapes = dict.fromkeys("qkvo", (width, width))
    shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    keys = jax.random.split(jax.random.key(width), len(shapes) + 1)
    params = {
        name: jax.random.normal(key, (LAYERS, *shape)) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    params |= {name: jnp.ones((LAYERS, width)) for name in ("norm_1", "norm_2")}
    return params, jax.random.normal(keys[-1], (tokens, width), jnp.bfloat16)


def _step(params: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(_loss)(params, x)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), loss


def _loss(params: Any, x: jax.Array) -> jax.Array:
    out, _ = jax.lax.scan(_block, x, params)
    return jnp.mean(out.astype(jnp.float32) ** 2)


def _block(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
    w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    y = _norm(x, w["norm_1"])
    q, k, v = (y @ w[name] for name in "qkv")
    x = x + (q * jax.nn.sigmoid(k) + v) @ w["o"]
    y = _norm(x, w["norm_2"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    size = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(size + 1e-6)).astype(x.dtype) * gain


if __name__ == "__main__":
    main()
