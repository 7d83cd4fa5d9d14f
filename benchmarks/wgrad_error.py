"""What do 128x128 blocks of x cost the weight gradient in accuracy?

    python -m benchmarks.wgrad_error

The relative error of `xᵀ dy` against float64 for `deepseek_v3`, x in tiles of 128
tokens times one channel, and `blocked_wgrad`, x in 128x128 blocks, on tokens of several
kinds. The same on every device. Writes benchmarks/results/wgrad_error.csv.
"""

import jax
import jax.numpy as jnp
import numpy as np

import fp8jax
from benchmarks import _harness
from fp8jax import recipes
from fp8jax.testing import lognormal_tokens

TOKENS, IN, OUT = 2048, 512, 512
RECIPES = {
    "deepseek_v3": recipes.deepseek_v3(),
    "blocked_wgrad": recipes.blocked_wgrad(),
}
OUTLIER_CHANNELS, OUTLIERS = 8, (1e2, 1e3, 1e4)


def main() -> None:
    options = _harness.options_parser(__doc__).parse_args()
    rows = []
    print(f"{'tokens':36}", *(f"{name:>15}" for name in RECIPES))
    for kind, x in _tokens().items():
        errors = {name: f"{_error(x, r) * 100:.3f}" for name, r in RECIPES.items()}
        print(f"{kind:36}", *(f"{e + ' %':>15}" for e in errors.values()), flush=True)
        rows.append({"tokens": kind, **errors})
    print(f"wrote {_harness.write_csv('wgrad_error', rows, options.commit)}")


def _tokens() -> dict[str, np.ndarray]:
    """Activations [tokens, channels] whose sizes differ along neither, one or both."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((TOKENS, IN), np.float32)
    wide = normal * rng.lognormal(sigma=3.0, size=(TOKENS, 1)).astype(np.float32)
    outlier = rng.choice(IN, OUTLIER_CHANNELS, replace=False)
    rows = {"normal": normal, "log-normal": lognormal_tokens(rng, (TOKENS, IN))}
    for name, x in (("normal", normal), ("log-normal, sigma 3", wide)):
        for factor in OUTLIERS:
            sizes = np.ones(IN, np.float32)
            sizes[outlier] = factor
            rows[f"{name}, {OUTLIER_CHANNELS} channels x {factor:.0e}"] = x * sizes
    return rows


def _error(x: np.ndarray, recipe: recipes.Recipe) -> float:
    """Relative error of a row of dW, its mean: a large channel does not hide others."""
    dy = np.random.default_rng(1).standard_normal((TOKENS, OUT), np.float32)
    w = jnp.zeros((IN, OUT))
    dims = (((1,), (0,)), ((), ()))

    def dot(w: jax.Array) -> jax.Array:
        return fp8jax.dot_general(jnp.asarray(x), w, dims, recipe=recipe)

    (dw,) = jax.vjp(dot, w)[1](jnp.asarray(dy))
    exact = x.T.astype(np.float64) @ dy.astype(np.float64)
    error = np.linalg.norm(np.asarray(dw, np.float64) - exact, axis=1)
    return float(np.mean(error / np.linalg.norm(exact, axis=1)))


if __name__ == "__main__":
    main()
