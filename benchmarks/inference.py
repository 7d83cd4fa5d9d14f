"""How fast are a decode step and a prefill with FP8 weights, against BF16?

    python -m benchmarks.inference [--layers 8] [--tokens 1 16 64 4096] [--hlo]

The matrices of a 7B decoder (4096 wide, 14336 in the middle, 32 query and 8 key-value
heads of 128, as in Mistral 7B), with norms and residuals, as NNX layers in one jitted
step. Attention itself is left out on both sides: the output projection takes the sum of
queries, keys and values. The weights of all layers do not fit the L2 cache. Contenders:

- `jax bf16`: Flax's layers.
- `fp8 layers`: this library's, by their names alone; kernels are QTensors.
- `fp8 fused`: the same, given what `quantize_add_rms_norm` makes of their input and of
  the residual before them.
- `fp8 xla`: activations quantized by XLA's fusions, products by this library's kernels.

Times: by wall clock, one launch behind the other from Python; queued, the launches
ahead of the device, as when the host has time (a step of 8 layers has a hundred
arguments, and takes the host as long as the device); and kernels alone, by CUPTI.

Writes benchmarks/results/inference.csv, and with --hlo what the programs launch to
inference_kernels.txt.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import fp8jax
import fp8jax.nnx
from benchmarks import _harness, _hlo
from benchmarks._peaks import PEAK_TFLOPS, memory_ceiling
from fp8jax import numerics, quant

BASE, PLAIN, FUSED, BY_XLA = KINDS = "jax bf16", "fp8 layers", "fp8 fused", "fp8 xla"
TOKENS = [1, 16, 64, 4096]
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")  # As published checkpoints.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Features of a decoder layer: in, between, of all queries, of all keys."""

    width: int = 4096
    hidden: int = 14336
    queries: int = 4096
    keys: int = 1024


SIZES = Sizes()


class SwiGLU(nnx.Module):
    """The gated MLP as a user of Flax writes it."""

    def __init__(self, width: int, hidden: int, **how: Any):
        self.gate = nnx.Linear(width, hidden, use_bias=False, **how)
        self.up = nnx.Linear(width, hidden, use_bias=False, **how)
        self.down = nnx.Linear(hidden, width, use_bias=False, **how)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One decoder layer without its attention, as contender `kind` has it."""

    def __init__(self, sizes: Sizes, kind: str, rngs: nnx.Rngs):
        how = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": rngs}
        linear: Any = nnx.Linear if kind == BASE else fp8jax.nnx.Linear
        mlp: Any = SwiGLU if kind == BASE else fp8jax.nnx.SwiGLU
        wide = sizes.queries + 2 * sizes.keys
        self.norm = nnx.RMSNorm(sizes.width, **how)
        self.qkv = linear(sizes.width, wide, use_bias=False, **how)
        self.out = linear(sizes.queries, sizes.width, use_bias=False, **how)
        self.mlp_norm = nnx.RMSNorm(sizes.width, **how)
        self.mlp = mlp(sizes.width, sizes.hidden, **how)
        self.sizes, self.kind = sizes, kind

    def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What went past a layer and what it added, to this layer's own."""
        ends = self.sizes.queries, self.sizes.queries + self.sizes.keys
        h, x = self.normalized(self.norm, x, y)
        q, k, v = jnp.split(self.qkv(h), ends, axis=-1)
        mixed = q + jnp.tile(k + v, q.shape[-1] // k.shape[-1])
        y = self.out(by_xla(mixed) if self.kind == BY_XLA else mixed)
        h, x = self.normalized(self.mlp_norm, x, y)
        if self.kind != BY_XLA:
            return x, self.mlp(h)
        gate, up = (fp8_linear(layer, h) for layer in (self.mlp.gate, self.mlp.up))
        q_h, _ = quant.quantize_swiglu(gate, up, spec_t=None, implementation="xla")
        assert q_h is not None
        return x, fp8_linear(self.mlp.down, q_h)

    def normalized(
        self, norm: nnx.RMSNorm, x: jax.Array, y: jax.Array
    ) -> tuple[Any, jax.Array]:
        """What the layers after a norm take, and what it was made of: the sum."""
        if self.kind == FUSED:
            assert norm.scale is not None
            weight, epsilon = norm.scale[...], norm.epsilon
            q, _, x = quant.quantize_add_rms_norm(x, y, weight, epsilon=epsilon)
            return q, x
        x = x + y
        return by_xla(norm(x)) if self.kind == BY_XLA else norm(x), x


def by_xla(x: jax.Array) -> fp8jax.QTensor:
    return fp8jax.quantize(x, implementation="xla")


def fp8_linear(layer: nnx.Linear, x: fp8jax.QTensor) -> jax.Array:
    """The product of a layer of `fp8jax.nnx.SwiGLU`, which are Flax's own."""
    kernel: Any = layer.kernel.get_value()
    return fp8jax.scaled_matmul(x, kernel.T, out_dtype=jnp.bfloat16)


class Stack(nnx.Module):
    """Decoder layers, one after the other."""

    def __init__(self, layers: int, sizes: Sizes, kind: str, rngs: nnx.Rngs):
        self.blocks = nnx.List(Block(sizes, kind, rngs) for _ in range(layers))
        # Our kernels take rows in eights: pad once, and not in each product.
        self.row_multiple = 1 if kind == BASE else 8

    def __call__(self, x: jax.Array) -> jax.Array:
        m = x.shape[0]
        x = jnp.pad(x, ((0, -m % self.row_multiple), (0, 0)))
        y = jnp.zeros_like(x)
        for block in self.blocks:
            x, y = block(x, y)
        return (x + y)[:m]


class Step:
    """The jitted stack of one contender.

    It takes parameters as a list: to take NNX's tree apart at each call takes longer
    than a few decoder layers.
    """

    def __init__(self, layers: int, sizes: Sizes, kind: str):
        def make() -> Stack:
            return Stack(layers, sizes, kind, nnx.Rngs(0))

        self.graph, self.shapes = nnx.split(nnx.eval_shape(make))

    def parameters(self) -> Any:
        """Random ones in BF16, others in each layer, as a tree of NNX's."""
        leaves, structure = jax.tree.flatten(self.shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        made = [_random(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, made)

    def jit(self, parameters: Any) -> tuple[Any, list[jax.Array]]:
        """A function of a list and of x `[m, width]`, and the list."""
        leaves, structure = jax.tree.flatten(parameters)

        def run(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
            return nnx.merge(self.graph, jax.tree.unflatten(structure, leaves))(x)

        return jax.jit(run), leaves


def _random(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if len(shape) == 1:  # Of a norm.
        return jnp.ones(shape, jnp.bfloat16)
    # In float32: normal numbers drawn in BF16 have a mean, and layers of them a common
    # mode that grows.
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return (draw(key, shape) * shape[0] ** -0.5).astype(jnp.bfloat16)


def quantized(weight: jax.Array) -> jax.Array | fp8jax.QTensor:
    """A matrix in FP8; a vector as it is."""
    if weight.ndim < 2:
        return weight
    return quant.contraction_minor(
        jax.jit(fp8jax.quantize, static_argnums=1)(weight, SPEC)
    )


def main() -> None:
    options = _options()
    steps = {kind: Step(options.layers, SIZES, kind) for kind in options.contenders}
    plain = steps[BASE].parameters()
    fp8 = jax.tree.map(quantized, plain)
    runs = {k: s.jit(plain if k == BASE else fp8) for k, s in steps.items()}
    print(
        f"{'m':>5}  {'contender':12}{'wall us':>9}{'queued us':>10}{'kernel us':>10}"
        f"{'GB/s':>7}{'TFLOPS':>8}{'wall x':>8}{'queued x':>9}{'kernel x':>9}"
        f"{'SQNR dB':>9}"
    )
    rows, programs, path = [], [], None
    for m in options.tokens:
        x = jax.random.normal(jax.random.key(m), (m, SIZES.width)).astype(jnp.bfloat16)
        rows += _rows(x, options, runs)
        # Each time: a run that is stopped loses no row.
        path = _harness.write_csv("inference", rows, options.commit)
        for kind, (run, leaves) in runs.items() if options.hlo else ():
            hlo = run.lower(leaves, x).compile().as_text() or ""
            programs += [f"{kind}: m {m}", *_hlo.report(hlo), ""]
    ceilings = f"{memory_ceiling()}, {PEAK_TFLOPS} TFLOPS"
    print(f"a layer's time; ceilings {ceilings}; wrote {path}")
    if programs:
        path = _harness.RESULTS / "inference_kernels.txt"
        path.write_text("\n".join(programs))
        print(*programs, f"wrote {path}", sep="\n")


def _options() -> argparse.Namespace:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--hlo", action="store_true", help="list what the programs launch"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    # What the others are measured against comes first.
    options.contenders = dict.fromkeys([BASE, *options.contenders])
    return options


def _rows(
    x: jax.Array, options: argparse.Namespace, runs: dict[str, Any]
) -> list[dict[str, Any]]:
    m, layers = x.shape[0], options.layers
    outputs = {kind: run(leaves, x) for kind, (run, leaves) in runs.items()}
    calls = {kind: lambda r=run, w=w: r(w, x) for kind, (run, w) in runs.items()}
    wall = _harness.alternate(calls, rounds=options.rounds)
    queued = _harness.alternate_queued(calls, rounds=options.rounds)
    kernel = _harness.alternate_clocks(
        {kind: _harness.kernel_clock(run, w, x) for kind, (run, w) in runs.items()},
        rounds=3,
    )
    weights = sum(w.size for w in runs[BASE][1] if w.ndim == 2)
    rows = []
    for kind, (_, leaves) in runs.items():
        held = sum(w.nbytes for w in leaves if w.ndim == 2)
        sqnr = numerics.sqnr_db(*(outputs[k].astype(jnp.float32) for k in (BASE, kind)))
        row = {
            "m": m,
            "contender": kind,
            "weight_bytes": held // layers,
            "wall_us": f"{wall[kind] / layers:.1f}",
            "queued_us": f"{queued[kind] / layers:.1f}",
            "kernel_us": f"{kernel[kind] / layers:.1f}",
            "weight_gbps": f"{held / queued[kind] * 1e-3:.0f}",
            "tflops": f"{2 * m * weights / queued[kind] * 1e-6:.0f}",
            "wall_speedup": f"{wall[BASE] / wall[kind]:.3f}",
            "queued_speedup": f"{queued[BASE] / queued[kind]:.3f}",
            "kernel_speedup": f"{kernel[BASE] / kernel[kind]:.3f}",
            "sqnr_db": f"{float(sqnr):.1f}",
        }
        print(
            f"{m:5}  {kind:12}",
            *(f"{v:>{w}}" for v, w in zip([*row.values()][3:], _WIDTHS, strict=True)),
            sep="",
            flush=True,
        )
        rows.append(row)
    return rows


_WIDTHS = (9, 10, 10, 7, 8, 8, 9, 9, 9)


if __name__ == "__main__":
    main()
