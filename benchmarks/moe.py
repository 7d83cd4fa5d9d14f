"""How fast is a mixture of experts, forward and all gradients, against BF16?

    python -m benchmarks.moe [--recipe deepseek_v3 ...] [--hlo] [--rounds 7]

`fp8jax.ops.moe` with routing, permutation and every quantization, in one jitted
function that returns y and the gradients of x, the router and the three weights; all
but the router in bfloat16. In BF16 by `lax.ragged_dot` ("jax bf16"), and by the kernels
that Pallas comes with ("pallas bf16"). "dense bf16" is no mixture: one MLP of as many
FLOPs, over all rows. Writes benchmarks/results/moe.csv, and with --hlo what the
compiled FP8 programs launch to moe_kernels.txt.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _harness, _hlo, _ragged, layer
from benchmarks._peaks import PEAK_TFLOPS
from fp8jax import ops, recipes


class Sizes(NamedTuple):
    """Of one mixture; `tokens * top_k` rows go through the experts."""

    tokens: int
    features: int
    hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Of nine products: three, and two gradients of each."""
        return 18 * self.tokens * self.top_k * self.features * self.hidden


SIZES = [Sizes(16384, 7168, 2048, 8, 2), Sizes(4096, 4096, 1536, 32, 4)]
LAX, PALLAS, DENSE = "jax bf16", "pallas bf16", "dense bf16"
BASES = (LAX, PALLAS, DENSE)


def main() -> None:
    options = _options()
    rows, programs, path = [], [], None
    print(
        f"{'tokens':>7}{'in':>7}{'hidden':>7}{'experts':>8}{'top':>4}  "
        f"{'contender':28}{'wall us':>10}{'kernel us':>10}{'TFLOPS':>8}"
        f"{'over lax':>9}{'pallas':>8}{'dense':>8}"
    )
    for sizes in SIZES:
        layers = _layers(sizes, options)
        rows += _rows(sizes, layers, options.rounds)
        # Each time: a run that is stopped loses no row.
        path = _harness.write_csv("moe", rows, options.commit)
        for name in options.recipe if options.hlo else ():
            run, args = layers[f"fp8jax {name}"]
            hlo = run.lower(*args).compile().as_text() or ""
            programs += [f"{name}: {sizes}", *_hlo.report(hlo), ""]
    print(f"ceiling {PEAK_TFLOPS} TFLOPS; wrote {path}")
    layer.write_programs("moe_kernels", programs)


def _options() -> argparse.Namespace:
    parser = layer.options_parser(__doc__, ["deepseek_v3", "blocked_wgrad"])
    parser.add_argument(
        "--without",
        nargs="+",
        type=lambda name: name.replace("-", " "),
        choices=BASES,
        default=[],
        help="not to be timed; jax-bf16 is 'jax bf16'",
    )
    return parser.parse_args()


# A jitted function, and what it is timed on.
_Layer = tuple[Any, tuple[jax.Array, ...]]


def _layers(sizes: Sizes, options: argparse.Namespace) -> dict[str, _Layer]:
    """The contenders, with those in BF16 that run here."""
    args = _arrays(sizes)
    routing = {"top_k": sizes.top_k}

    def mixture(moe: Callable[..., Any], **static: Any) -> _Layer:
        return _layer(functools.partial(moe, **static, **routing)), args

    bf16 = {
        LAX: mixture(ops.moe, recipe=recipes.bf16()),
        PALLAS: mixture(moe_of, ragged_dot=_ragged.pallas_ragged_dot),
        DENSE: _dense(sizes, args),
    }
    bf16 = {name: bf16[name] for name in BASES if name not in options.without}
    launch = {name: functools.partial(run, *a) for name, (run, a) in bf16.items()}
    layers = {name: bf16[name] for name in _harness.working(launch)}
    for name in options.recipe:
        layers[f"fp8jax {name}"] = mixture(ops.moe, recipe=layer.RECIPES[name])
    return layers


def _arrays(sizes: Sizes) -> tuple[jax.Array, ...]:
    """x, router, bias, the three weights and the output's cotangent."""
    tokens, k, hidden, experts, _ = sizes
    shapes = (
        (tokens, k),
        (k, experts),
        (experts, k, hidden),
        (experts, k, hidden),
        (experts, hidden, k),
        (tokens, k),
    )
    scales = (1.0, k**-0.5, k**-0.5, k**-0.5, hidden**-0.5, 1.0)
    keys = jax.random.split(jax.random.key(sum(sizes)), len(shapes))
    x, router, *others = (
        jax.random.normal(key, shape, jnp.float32 if i == 1 else jnp.bfloat16)
        * jnp.asarray(scale, jnp.float32 if i == 1 else jnp.bfloat16)
        for i, (key, shape, scale) in enumerate(zip(keys, shapes, scales, strict=True))
    )
    return x, router, jnp.zeros(experts, jnp.float32), *others


def _layer(moe: Callable[..., Any]) -> Any:
    """Jitted: y, and all gradients for a given cotangent."""

    @jax.jit
    def run(x, router, bias, w_gate, w_up, w_down, dout):
        def of_trained(x, router, *weights):
            return moe(x, router, bias, *weights)

        y, vjp, _ = jax.vjp(of_trained, x, router, w_gate, w_up, w_down, has_aux=True)
        return y, *vjp(dout)

    return run


def _dense(sizes: Sizes, args: tuple[jax.Array, ...]) -> _Layer:
    """One expert's MLP over as many rows as all experts have."""

    @jax.jit
    def run(x, w_gate, w_up, w_down, dout):
        mlp = functools.partial(ops.swiglu_mlp, recipe=recipes.bf16())
        y, vjp = jax.vjp(mlp, x, w_gate, w_up, w_down)
        return y, *vjp(dout)

    x, _, _, *weights, dout = args
    x, dout = (jnp.tile(a, (sizes.top_k, 1)) for a in (x, dout))
    return run, (x, *(w[0] for w in weights), dout)


def moe_of(
    x: jax.Array,
    router: jax.Array,
    bias: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    ragged_dot: Callable[..., jax.Array],
    **routing: Any,
) -> tuple[jax.Array, jax.Array]:
    """`fp8jax.ops.moe` in BF16 with another `ragged_dot`."""
    logits = jnp.matmul(
        x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST
    )
    routed = ops.route(logits, bias, **routing)
    to = ops.dispatch(routed.experts, len(bias))
    rows = ops.permute(x, to)
    gate, up = (ragged_dot(rows, w, to.group_sizes) for w in (w_gate, w_up))
    h = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    y = ragged_dot(h.astype(x.dtype), w_down, to.group_sizes)
    return ops.unpermute(y, routed.weights, to), to.group_sizes


def _rows(sizes: Sizes, layers: dict[str, _Layer], rounds: int) -> list[dict[str, Any]]:
    launch: dict[str, Callable[[], Any]] = {
        name: functools.partial(run, *args) for name, (run, args) in layers.items()
    }
    clocks = {
        name: _harness.kernel_clock(run, *args, iterations=3)
        for name, (run, args) in layers.items()
    }
    wall = _harness.alternate(launch, launches=10, rounds=rounds)
    kernel = _harness.alternate_clocks(clocks, rounds=3)
    rows = []
    for name in layers:
        over = [
            f"{wall[base] / wall[name]:.3f}" if base in wall else "" for base in BASES
        ]
        tflops = f"{sizes.flops / wall[name] * 1e-6:.0f}"
        print(
            f"{sizes.tokens:7}{sizes.features:7}{sizes.hidden:7}{sizes.experts:8}"
            f"{sizes.top_k:4}  {name:28}{wall[name]:10.1f}{kernel[name]:10.1f}"
            f"{tflops:>8}{over[0]:>9}{over[1]:>8}{over[2]:>8}",
            flush=True,
        )
        rows.append(
            {
                **sizes._asdict(),
                "contender": name,
                "wall_us": f"{wall[name]:.1f}",
                "kernel_us": f"{kernel[name]:.1f}",
                "tflops": tflops,
                "over_lax": over[0],
                "over_pallas": over[1],
                "over_dense": over[2],
            }
        )
    return rows


if __name__ == "__main__":
    main()
