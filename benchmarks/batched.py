"""From how many rows per entry on does FP8 pay in a batch of products?

    python -m benchmarks.batched [--rows 128 256] [--seconds 240]

A train step of experts of equal capacity: a gated MLP as batched einsums, over the same
step in BF16. Weights are float32 parameters, cast where they are used and updated by
their gradients, so that each step quantizes every weight once. What `--seconds` leave
no time for is left out, last rows first. Writes benchmarks/results/batched.csv.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fp8jax
from benchmarks import _harness
from benchmarks.layer import RECIPES

ROWS = (128, 256, 512, 1024, 2048, 4096)  # Of each entry.
BASE = "jax bf16"


class Experts(NamedTuple):
    """How many experts a batch has, and the sides of their weights."""

    entries: int
    width: int
    hidden: int


MODELS = {
    "mixtral": Experts(8, 4096, 14336),
    "qwen3-moe": Experts(64, 2048, 768),
    "deepseek-v3": Experts(16, 7168, 2048),
}
FORMS = ("tokens first", "weight first")


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=MODELS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="deepseek_v3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, about")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    print(f"{'model':>12}{'rows':>6}{'BF16 us':>10}{'FP8 us':>10}{'speed':>7}  form")
    rows = []
    for form in options.forms:
        for count in options.rows:
            for model in options.models:
                if time.monotonic() < end:
                    rows.append(_row(model, count, form, options))
    print(f"wrote {_harness.write_csv('batched', rows, options.commit)}")


def _row(model: str, rows: int, form: str, options: Any) -> dict[str, Any]:
    experts = MODELS[model]
    params, x = jax.jit(_arrays, static_argnums=(0, 1))(experts, rows)
    step = functools.partial(_step, _MLPS[form])
    fp8 = fp8jax.fp8_transform(jax.jit(step), RECIPES[options.recipe])
    share = fp8.report(params, x).fraction
    if share < 1:
        raise RuntimeError(
            f"{model}, {rows} rows: {share:.1%} of FLOPs in FP8, not all"
        )
    steps = {BASE: jax.jit(step), options.recipe: fp8}
    launches = {name: functools.partial(f, params, x) for name, f in steps.items()}
    us = _harness.alternate(launches, launches=10, rounds=options.rounds)
    speed = us[BASE] / us[options.recipe]
    print(
        f"{model:>12}{rows:6}{us[BASE]:10.0f}{us[options.recipe]:10.0f}{speed:7.2f}"
        f"  {form}",
        flush=True,
    )
    return {
        "model": model,
        "form": form,
        **experts._asdict(),
        "rows": rows,
        "recipe": options.recipe,
        "bf16_us": f"{us[BASE]:.0f}",
        "fp8_us": f"{us[options.recipe]:.0f}",
        "speed": f"{speed:.3f}",
    }


def _arrays(experts: Experts, rows: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Weights in float32, and each expert's rows in bfloat16."""
    entries, width, hidden = experts
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    keys = jax.random.split(jax.random.key(width), len(shapes) + 1)
    params = {
        name: jax.random.normal(key, (entries, *shape)) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return params, jax.random.normal(keys[-1], (entries, rows, width), jnp.bfloat16)


def _step(mlp: Any, params: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(functools.partial(_loss, mlp))(params, x)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), loss


def _loss(mlp: Any, params: Any, x: jax.Array) -> jax.Array:
    w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return jnp.mean((x + mlp(w, x)).astype(jnp.float32) ** 2)


def _tokens_first(w: Any, x: jax.Array) -> jax.Array:
    gate = jnp.einsum("ecd,edf->ecf", x, w["gate"])
    up = jnp.einsum("ecd,edf->ecf", x, w["up"])
    return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, w["down"])


def _weight_first(w: Any, x: jax.Array) -> jax.Array:
    gate = jnp.einsum("edf,ecd->efc", w["gate"], x)
    up = jnp.einsum("edf,ecd->efc", w["up"], x)
    return jnp.einsum("efd,efc->ecd", w["down"], jax.nn.silu(gate) * up)


_MLPS: dict[str, Any] = dict(zip(FORMS, (_tokens_first, _weight_first), strict=True))


if __name__ == "__main__":
    main()
