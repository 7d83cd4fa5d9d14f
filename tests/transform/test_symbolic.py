"""`jax.export` with symbolic dimensions: one program, the bits of every batch's own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import fp8jax
import fp8jax.nnx
from fp8jax import ops, recipes
from fp8jax.quant import QuantSpec, quantize
from fp8jax.transform import fp8_transform

D, HIDDEN, EXPERTS = 128, 256, 2
BATCH, TIME = 3, 43  # 129 rows: one more than a tile of wgrad.

pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.1


PARAMS = {"up": normal(0, D, HIDDEN), "down": normal(1, HIDDEN, D)}
X = normal(2, BATCH, TIME, D)
SIZES = np.array([60, 69], np.int32)
W_GROUPS = normal(3, EXPERTS, D, HIDDEN), normal(4, EXPERTS, HIDDEN, D)


def forward(params, x):
    h = jax.nn.silu(jnp.einsum("btd,dh->bth", x, params["up"]))
    return h @ params["down"]


def loss(run, params, x):
    return jnp.mean(jnp.square(run(params, x)))


def step(params, x, run=forward):
    value, grads = jax.value_and_grad(functools.partial(loss, run))(params, x)
    return jax.tree.map(lambda p, g: p - g, params, grads), value


def over_batch(params, xs):
    """Gradients summed over a scan as long as the first symbolic dimension."""

    def add(total, x):
        grads = jax.grad(functools.partial(loss, forward))(params, x[None])
        return jax.tree.map(jnp.add, total, grads), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]


def ragged(params, x):
    rows = x.reshape(-1, D)
    return fp8jax.ragged_dot(rows, params["gate"], SIZES)


def experts(params, x):
    gate, down = params["gate"], params["down"]
    return ops.expert_mlp(x.reshape(-1, D), gate, gate, down, SIZES)


def gated(params, x):
    return ops.swiglu_mlp(x, params["up"], params["up"], params["down"])


def normed(params, x):
    return ops.rms_norm_dot(x, jnp.ones(D), params["up"])[0]


def routed(params, x):
    gate, down = params["gate"], params["down"]
    router, bias = jnp.eye(D, EXPERTS), jnp.zeros(EXPERTS)
    return ops.moe(x, router, bias, gate, gate, down, top_k=1)[0]


def stored(params, x):
    spec = QuantSpec(tile=(128, 128))
    codes = {name: quantize(w, spec) for name, w in params.items()}
    return fp8_transform(forward, weight_dtype=jnp.float32)(codes, x)


def layer(params, x):
    return fp8jax.nnx.Linear(D, HIDDEN, rngs=nnx.Rngs(0))(x)


GROUPS = {"gate": W_GROUPS[0], "down": W_GROUPS[1]}
CASES = {
    "forward": (fp8_transform(forward), PARAMS),
    "jitted": (fp8_transform(jax.jit(forward)), PARAMS),
    "step": (fp8_transform(step), PARAMS),
    "codes kept": (
        fp8_transform(step, recipes.deepseek_v3(residual="fp8")),
        PARAMS,
    ),
    "scan": (fp8_transform(over_batch), PARAMS),
    "layer": (functools.partial(step, run=fp8_transform(forward)), PARAMS),
    "stored": (stored, PARAMS),
    "ragged": (functools.partial(step, run=ragged), GROUPS),
    "experts": (functools.partial(step, run=experts), GROUPS),
    "moe": (functools.partial(step, run=routed), GROUPS),
    "swiglu": (functools.partial(step, run=gated), PARAMS),
    "norm": (functools.partial(step, run=normed), PARAMS),
    "nnx": (layer, PARAMS),
}


def exported(fn, params, *, platforms=None):
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    sides = export.symbolic_shape("batch, time")
    x = jax.ShapeDtypeStruct((*sides, D), jnp.float32)
    fn = fn if hasattr(fn, "lower") else jax.jit(fn)
    return export.export(fn, platforms=platforms)(shapes, x)


@pytest.mark.parametrize("name", CASES)
def test_one_program_has_the_bits_of_each_batch_s_own(name):
    fn, params = CASES[name]
    want = fn(params, X) if hasattr(fn, "lower") else jax.jit(fn)(params, X)
    got = jax.jit(exported(fn, params).call)(params, X)
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("name", ["forward", "step", "moe"])
def test_a_program_of_symbolic_sides_is_lowered_for_gpus_in_fp8(name):
    module = exported(*CASES[name], platforms=["cuda"]).mlir_module()
    assert "f8E4M3FN" in module


def test_a_gpu_s_kernel_asked_for_is_refused_with_the_shapes():
    fn = fp8_transform(forward, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu"):
        exported(fn, PARAMS)


def test_a_report_asks_for_known_sizes():
    sides = export.symbolic_shape("batch, time")
    x = jax.ShapeDtypeStruct((*sides, D), jnp.float32)
    with pytest.raises(ValueError, match=r"report takes .*\(batch, time, 128\)"):
        fp8_transform(step).report(PARAMS, x)
