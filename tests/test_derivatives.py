"""Codes are never differentiated: every public name that makes or reads them refuses.

JAX gives FP8 codes cotangents that are FP8 themselves, without a scale: exact zeros for
most losses. Each public name of the library is placed in one of the tables below; a new
one fails `test_every_public_name_is_placed` until it is.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import fp8jax
from fp8jax import matmul, numerics, ops, quant
from fp8jax._elementwise import Elementwise, Step
from fp8jax.quant import BLOCK_128X128, TILE_1X128, TILE_128X1, QTensor

SIDE = 128
DIMS = (((1,), (0,)), ((), ()))
GROUPS = 2

X = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)), jnp.float32)
W = fp8jax.quantize(X / 8, BLOCK_128X128)
EXPERTS = fp8jax.quantize(jnp.stack([X / 8, X / 8]), BLOCK_128X128)
SIZES = jnp.array([SIDE // 2, SIDE // 2], jnp.int32)
FP32 = fp8jax.QuantSpec(scale="fp32")
F32 = np.dtype(np.float32)
TWICE = Elementwise(("matrix",), (F32,), (Step("add", (0, 0), F32),), (1,))


def codes(x: jax.Array, tile: tuple[int, int] = (1, 128)) -> QTensor:
    """A QTensor whose codes JAX differentiates, as its own cast to FP8 lets it."""
    scale = jnp.ones(numerics.scale_shape(x.shape, tile), jnp.float32)
    return QTensor(x.astype(jnp.float8_e4m3fn), scale, tile)


def stacked(x: jax.Array) -> QTensor:
    return codes(jnp.stack([x, x]), (128, 128))


def operand(contraction: int = 1) -> ops.Operand:
    return ops.plan(X.shape, X.shape, (((contraction,), (0,)), ((), ())), "test").lhs


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    (codes,) = ops.split_codes(operand(), (((1, TILE_1X128),),), [x], None)
    return codes


def split_product(lhs, rhs):
    layout = ops.plan(X.shape, X.shape, DIMS, "test")
    tiles = (1, 128), (1, 128)
    return ops.multiply_split(lhs, rhs, layout, tiles, np.dtype(jnp.float32), None)


def product(q: QTensor) -> jax.Array:
    layout = ops.plan(X.shape, X.shape, DIMS, "test")
    return ops.multiply_operands(q, W, layout, np.dtype(jnp.float32), None)


# What makes or reads codes, each by a function that differentiates nothing else, and
# who the error says it is about.
Use = tuple[Callable[[jax.Array], Any], str]


def scaled(x: jax.Array, q: QTensor | None = None) -> QTensor:
    """W, or another one, of scales that depend on x."""
    q = W if q is None else q
    return dataclasses.replace(q, scale=q.scale * x[0, 0])


def static_dot(x: jax.Array, w: QTensor) -> jax.Array:
    return ops.static_weight_dot("layer", x, w, out_dtype=jnp.float32)


def static_norm(x: jax.Array, w: QTensor) -> tuple[jax.Array, ...]:
    how: Any = {"epsilon": 1e-6, "out_dtype": jnp.float32}
    return ops.static_weight_rms_norm("layer", x, X[0], w, **how)


def static_swiglu(x: jax.Array, w: QTensor) -> jax.Array:
    return ops.static_weight_swiglu("layer", x, w, w, w, out_dtype=jnp.float32)


REFUSES: dict[str, Use] = {
    "QTensor.dequantize": (lambda x: codes(x).dequantize(), "QTensor.dequantize"),
    "matmul.grouped_matmul": (
        lambda x: matmul.grouped_matmul(codes(x), EXPERTS, SIZES),
        "grouped_matmul",
    ),
    "matmul.grouped_wgrad": (
        lambda x: matmul.grouped_wgrad(codes(x), codes(X), jnp.array([128])),
        "grouped_wgrad",
    ),
    "matmul.scaled_matmul": (
        lambda x: matmul.scaled_matmul(codes(x), W),
        "scaled_matmul",
    ),
    "matmul.swiglu_matmul": (
        lambda x: matmul.swiglu_matmul(codes(x), W, W),
        "swiglu_matmul",
    ),
    "numerics.decode_tiles": (
        lambda x: numerics.decode_tiles(
            x.astype(jnp.float8_e4m3fn)[None, :, None], jnp.ones((1, 1))
        ),
        "decode_tiles",
    ),
    "numerics.encode": (
        lambda x: numerics.encode(x, jnp.float32(1), jnp.float8_e4m3fn),
        "encode",
    ),
    # No codes, but bits: JAX's derivative would be zero, too.
    "numerics.integer_amax": (
        lambda x: numerics.integer_amax(x, (0,)),
        "integer_amax",
    ),
    "ops.multiply_operands": (lambda x: product(codes(x)), "scaled_matmul"),
    "ops.multiply_split": (
        lambda x: split_product(split(x), split(X)),
        "quantized_dot",
    ),
    "ops.split_codes": (lambda x: split(x)[1], "quantized_dot"),
    "ops.quantize_operand": (
        lambda x: ops.quantize_operand(x, operand(), TILE_1X128, None),
        "quantized_dot",
    ),
    "ops.quantize_operand_both": (
        lambda x: ops.quantize_operand_both(x, operand(), TILE_1X128, TILE_1X128, None),
        "quantized_dot",
    ),
    "ops.quantized_dot": (
        lambda x: ops.quantized_dot(x, X, DIMS, TILE_1X128, BLOCK_128X128),
        "quantized_dot",
    ),
    "ops.quantized_ragged_dot": (
        lambda x: ops.quantized_ragged_dot(
            x,
            jnp.stack([X, X]),
            SIZES,
            "fprop",
            TILE_1X128,
            BLOCK_128X128,
            out_dtype=np.dtype(jnp.float32),
        ),
        "quantized_ragged_dot",
    ),
    # Of the weight: the gradient of the input is in a test of its own.
    "ops.static_weight_dot": (lambda x: static_dot(X, scaled(x)), "layer"),
    "ops.static_weight_rms_norm": (lambda x: static_norm(X, scaled(x)), "layer"),
    "ops.static_weight_swiglu": (lambda x: static_swiglu(X, scaled(x)), "layer"),
    "quant.moments": (lambda x: quant.moments(x, codes(X)), "moments"),
    "quant.quantize": (quant.quantize, "quantize"),
    "quant.quantize_add_rms_norm": (
        lambda x: quant.quantize_add_rms_norm(x, X, X[0]),
        "quantize_add_rms_norm",
    ),
    "quant.quantize_both": (quant.quantize_both, "quantize_both"),
    "quant.quantize_grouped": (
        lambda x: quant.quantize_grouped(x, SIZES),
        "quantize_grouped",
    ),
    "quant.quantize_map": (
        lambda x: quant.quantize_map(TWICE, [x], [(TILE_1X128, None)]),
        "quantize_map",
    ),
    "quant.quantize_rms_norm": (
        lambda x: quant.quantize_rms_norm(x, X[0]),
        "quantize_rms_norm",
    ),
    "quant.quantize_swiglu": (lambda x: quant.quantize_swiglu(x, X), "quantize_swiglu"),
    "quant.quantize_swiglu_gradient": (
        lambda x: quant.quantize_swiglu_gradient(X, x, X),
        "quantize_swiglu_gradient",
    ),
    "quant.quantize_transposed": (quant.quantize_transposed, "quantize_transposed"),
    "quant.requantize": (
        lambda x: quant.requantize(codes(x), TILE_128X1),
        "requantize",
    ),
    "checkpoint.quantize_params": (
        lambda x: _checkpoint().quantize_params({"up_proj": {"weight": x}}),
        "quantize",
    ),
}

# Other operands and other ways through the same names.
MORE_REFUSALS: dict[str, Use] = {
    "rhs of scaled_matmul": (
        lambda x: matmul.scaled_matmul(codes(X), codes(x, (128, 128))),
        "scaled_matmul",
    ),
    "scale of scaled_matmul": (
        lambda x: matmul.scaled_matmul(QTensor(codes(X).data, x[:, :1], (1, 128)), W),
        "scaled_matmul",
    ),
    "accumulate of scaled_matmul": (
        lambda x: matmul.scaled_matmul(
            codes(X), W, out_dtype=jnp.float32, accumulate=x
        ),
        "scaled_matmul",
    ),
    "experts of grouped_matmul": (
        lambda x: matmul.grouped_matmul(codes(X), stacked(x), SIZES),
        "grouped_matmul",
    ),
    "swiglu_matmul in two": (
        lambda x: matmul.swiglu_matmul(codes(x), W, W, BLOCK_128X128),
        "swiglu_matmul",
    ),
    "up of swiglu_matmul": (
        lambda x: matmul.swiglu_matmul(codes(X), W, codes(x, (128, 128))),
        "swiglu_matmul",
    ),
    "quantize of a batch": (lambda x: quant.quantize(x.reshape(2, 64, -1)), "quantize"),
    "quantize of a batch, one by one": (
        lambda x: quant.quantize(x.reshape(2, 64, -1), BLOCK_128X128),
        "quantize",
    ),
    "quantize, fp32 scales, E5M2": (
        lambda x: quant.quantize(
            x, fp8jax.QuantSpec(scale="fp32", dtype=jnp.float8_e5m2)
        ),
        "quantize",
    ),
    "quantize of bfloat16": (
        lambda x: quant.quantize(x.astype(jnp.bfloat16)),
        "quantize",
    ),
    "quantize, scale alone": (lambda x: quant.quantize(x).scale, "quantize"),
    "quantize_both in two": (
        lambda x: quant.quantize_both(x, TILE_1X128, FP32),
        "quantize_both",
    ),
    "quantize_grouped in two": (
        lambda x: quant.quantize_grouped(x, SIZES, FP32),
        "quantize_grouped",
    ),
    "quantize_swiglu in two": (
        lambda x: quant.quantize_swiglu(X, x, TILE_1X128, FP32),
        "quantize_swiglu",
    ),
    "weight of quantize_rms_norm": (
        lambda x: quant.quantize_rms_norm(X, x[0]),
        "quantize_rms_norm",
    ),
    "rms of quantize_rms_norm": (
        lambda x: quant.quantize_rms_norm(x, X[0])[1],
        "quantize_rms_norm",
    ),
    "sum of quantize_add_rms_norm": (
        lambda x: quant.quantize_add_rms_norm(X, x, X[0])[2],
        "quantize_add_rms_norm",
    ),
    "codes of moments": (lambda x: quant.moments(X, codes(x)), "moments"),
    "scale of encode": (
        lambda x: numerics.encode(X, x, jnp.float8_e4m3fn),
        "encode",
    ),
    "experts in FP8": (
        lambda x: ops.expert_mlp(X, EXPERTS, scaled(x, EXPERTS), EXPERTS, SIZES),
        "expert_mlp",
    ),
    "codes turned, then read": (
        lambda x: codes(x).T.dequantize(),
        "QTensor.dequantize",
    ),
}

# These hand codes on as they are; who reads them refuses.
MOVES_CODES = {
    "QTensor.T",
    "QTensor.data",
    "QTensor.scale",
    "checkpoint.stack_experts",
    "checkpoint.unstack_experts",
    "numerics.join_tiles",
    "numerics.split_tiles",
    "quant.contraction_minor",
}

# Arrays in, arrays out, with a gradient that their own tests are about; where weights
# may be QTensors, those are the `static_weight_` ones above.
HAS_GRADIENT = {
    *("linen.Dense", "linen.DenseGeneral", "linen.Einsum", "linen.MoE"),
    *("linen.MultiHeadAttention", "linen.MultiHeadDotProductAttention"),
    *("linen.RMSNormDense", "linen.SwiGLU"),
    *("nnx.Einsum", "nnx.Linear", "nnx.LinearGeneral", "nnx.MoE"),
    *("nnx.MultiHeadAttention", "nnx.RMSNormLinear", "nnx.SwiGLU"),
    *("numerics.cosine_similarity", "numerics.relative_error", "numerics.sqnr_db"),
    *("numerics.expand_scale", "numerics.round_to", "numerics.scale_from_amax"),
    "numerics.round_up_pow2",  # Zero: its steps are what it is for.
    *("ops.ByRecipe", "ops.attention_products", "ops.dot_general", "ops.einsum"),
    *("ops.expert_mlp", "ops.moe", "ops.permute", "ops.ragged_dot"),
    *("ops.rms_norm_dot", "ops.route", "ops.swiglu_mlp", "ops.unpermute"),
    *("quant.fake_quantize", "quant.statistics", "quant.sum_moments"),
    *("transform.Fp8Function", "transform.fp8_transform"),
}

# Constants, types, checks, choices, integers, files and NumPy.
NOTHING_TO_DIFFERENTIATE = {
    *("QTensor.check", "QTensor.dtype", "QTensor.nbytes", "QTensor.ndim"),
    *("QTensor.shape", "QTensor.tile", "__version__", "checkpoint_policies"),
    *("numerics", "recipes"),
    *("numerics.at_most", "numerics.is_symbolic", "numerics.may_be_one"),
    *("checkpoint.CheckpointError", "checkpoint.Difference", "checkpoint.Outcome"),
    *("checkpoint.Reader", "checkpoint.Weight", "checkpoint.WeightRules"),
    *("checkpoint.code_histogram", "checkpoint.dequantize_checkpoint"),
    *("checkpoint.diff", "checkpoint.load", "checkpoint.quantize_checkpoint"),
    "checkpoint.save",
    *("linen.balance", "nnx.ExpertLoad", "nnx.RouterBias", "nnx.balance"),
    *("matmul.MARK", "matmul.gemm_implementation", "matmul.grouped_implementation"),
    "matmul.has_gpu_kernels",
    *("matmul.mark_of", "matmul.marked"),
    *("numerics.FP8_DTYPES", "numerics.GroupBlocks", "numerics.SMALLEST_SCALE"),
    *("numerics.ScaleKind", "numerics.Tile", "numerics.check_group_sizes"),
    *("numerics.count_group_blocks", "numerics.group_blocks", "numerics.is_fp8"),
    *("numerics.max_value", "numerics.no_derivative", "numerics.refuse_derivatives"),
    "numerics.scale_shape",
    *("ops.Dispatch", "ops.INPUT_CODES", "ops.INPUT_DTYPES", "ops.Layout"),
    *("ops.Operand", "ops.PRODUCT", "ops.Placement", "ops.RaggedForm", "ops.Routing"),
    *("ops.Spread", "ops.axes_of_mesh", "ops.axes_of_sharding", "ops.has_split_codes"),
    *("ops.placement", "ops.placement_of"),
    *("ops.WEIGHT_CODES", "ops.balanced_bias", "ops.check_quantized_input"),
    *("ops.check_routing", "ops.dispatch", "ops.output_dtype", "ops.plan"),
    *("ops.spread", "ops.spread_of_mesh", "ops.spread_of_sharding"),
    *("ops.takes_own_product", "ops.without_derivative"),
    *("quant.BLOCK_128X128", "quant.MOMENTS", "quant.QTensor", "quant.QuantSpec"),
    *("quant.TILE_128X1", "quant.TILE_1X128", "quant.grouped_columns"),
    "quant.maps_like_quantize",
    *("transform.KernelTime", "transform.Profile", "transform.ProfileRow"),
    *("transform.Report", "transform.Row", "transform.plot_statistics"),
}
ROOMS = ("quant", "matmul", "numerics", "ops", "transform", "checkpoint", "linen")
ROOMS = (*ROOMS, "nnx")
# Frozen dataclasses and functions of Python numbers; NumPy; the command line's.
WITHOUT_ARRAYS = ("recipes", "testing", "tune")


def _checkpoint() -> Any:
    return importlib.import_module("fp8jax.checkpoint")


def homes() -> dict[int, str]:
    """Where each public object is placed: by the first room that has it."""
    found: dict[int, str] = {}
    for room in (*ROOMS, *WITHOUT_ARRAYS):
        module = importlib.import_module(f"fp8jax.{room}")
        for name in module.__all__:
            found.setdefault(id(getattr(module, name)), f"{room}.{name}")
    return found


def public_names() -> set[str]:
    names: set[str] = set()
    for room in ROOMS:
        module = importlib.import_module(f"fp8jax.{room}")
        names |= {f"{room}.{name}" for name in module.__all__}
    members = {*QTensor.__dataclass_fields__, *vars(QTensor)}
    names |= {f"QTensor.{name}" for name in members if not name.startswith("_")}
    at = homes()
    names |= {n for n in fp8jax.__all__ if id(getattr(fp8jax, n)) not in at}
    # `ops` hands on what `matmul` has.
    return {n for n in names if n.partition(".")[2] not in _HANDED_ON or "ops" not in n}


_HANDED_ON = {name for name in matmul.__all__ if name in ops.__all__}


def test_every_public_name_is_placed():
    tables = REFUSES.keys(), MOVES_CODES, HAS_GRADIENT, NOTHING_TO_DIFFERENTIATE
    placed = [name for table in tables for name in table]
    assert len(placed) == len(set(placed)), "a name is in two tables"
    names = public_names()
    assert names - set(placed) == set(), "place these names in a table above"
    assert set(placed) - names == set(), "no public names"


def total(tree: Any) -> jax.Array:
    sums = [leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(sums).sum()


def _shard_map(f: Callable[[jax.Array], jax.Array], check_vma: bool) -> Any:
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("d",))
    spec = PartitionSpec("d")
    body = jax.shard_map(
        lambda x: f(x[0])[None],
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    return lambda x: body(jnp.stack([x, x])).sum() / 2


def _scan(f: Callable[[jax.Array], jax.Array]) -> Any:
    def scanned(x: jax.Array) -> jax.Array:
        def step(c, row):
            return c + f(row), None

        return jax.lax.scan(step, jnp.float32(0), x[None])[0]

    return scanned


def _closed_scan(f: Callable[[jax.Array], jax.Array]) -> Any:
    def scanned(x: jax.Array) -> jax.Array:
        def step(c, _):
            return c + f(x), None

        return jax.lax.scan(step, jnp.float32(0), length=1)[0]

    return scanned


def _carried(f: Callable[[jax.Array], jax.Array]) -> Any:
    def scanned(x: jax.Array) -> jax.Array:
        def step(c, _):
            return (c[0], c[1] + f(c[0])), None

        return jax.lax.scan(step, (x, jnp.float32(0)), length=1)[0][1]

    return scanned


WRAPS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None]).sum(),
    "remat": jax.checkpoint,
    "remat with a policy": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_saveable
    ),
    "scan": _scan,
    "scan over a constant": _closed_scan,
    "scan's carry": _carried,
    "cond": lambda f: lambda x: jax.lax.cond(x[0, 0] < 9, f, f, x),
    "shard_map": functools.partial(_shard_map, check_vma=False),
    "checked shard_map": functools.partial(_shard_map, check_vma=True),
}
DERIVATIVES: dict[str, Callable[[Any, jax.Array], Any]] = {
    "grad": lambda f, x: jax.grad(f)(x),
    "jitted grad": lambda f, x: jax.jit(jax.grad(f))(x),
    "vjp": lambda f, x: jax.vjp(f, x)[1](jnp.float32(1))[0],
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    "linearize": lambda f, x: jax.linearize(f, x)[1](jnp.ones_like(x)),
    "jacfwd": lambda f, x: jax.eval_shape(jax.jacfwd(f), x),
    "vmapped grad": lambda f, x: jax.vmap(jax.grad(f))(x[None])[0],
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", REFUSES | MORE_REFUSALS)
def test_codes_are_not_differentiated(name, derivative):
    use, about = (REFUSES | MORE_REFUSALS)[name]
    with pytest.raises(TypeError, match=rf"^{about} ") as raised:
        DERIVATIVES[derivative](lambda x: total(use(x)), X)
    assert "no derivative" in str(raised.value) or "no gradient" in str(raised.value)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", REFUSES)
def test_transformations_do_not_hide_the_refusal(name, wrap):
    use, about = REFUSES[name]
    with pytest.raises(TypeError, match=rf"^{about} "):
        jax.grad(WRAPS[wrap](lambda x: total(use(x))))(X)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("use", [static_dot, static_norm, static_swiglu])
def test_transformations_keep_the_gradient_through_stored_weights(use, wrap):
    def loss(x):
        return total(use(x, W))

    expected = jax.grad(loss)(X)
    assert jnp.abs(expected).max() > 0
    got = jax.grad(WRAPS[wrap](loss))(X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSES | MORE_REFUSALS)
def test_constants_are_quantized_inside_of_what_is_differentiated(name):
    use, _ = (REFUSES | MORE_REFUSALS)[name]

    def loss(x: jax.Array) -> jax.Array:
        stopped = total(use(jax.lax.stop_gradient(x)))
        return x.sum() + stopped + total(use(X))

    for derivative in ("grad", "jitted grad", "vmapped grad"):
        got = DERIVATIVES[derivative](loss, X)
        np.testing.assert_array_equal(got, jnp.ones_like(X))
    for derivative in ("jvp", "linearize"):
        assert DERIVATIVES[derivative](loss, X) == X.size


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "name", ["quant.quantize", "matmul.scaled_matmul", "QTensor.dequantize"]
)
def test_constants_pass_through_every_transformation(name, wrap):
    use, _ = REFUSES[name]

    def loss(x: jax.Array) -> jax.Array:
        return x.sum() + total(use(jax.lax.stop_gradient(x)))

    wrapped = WRAPS[wrap](loss)
    np.testing.assert_array_equal(jax.grad(wrapped)(X), jnp.ones_like(X))
    np.testing.assert_array_equal(jax.jit(jax.grad(wrapped))(X), jnp.ones_like(X))
    assert jax.jvp(wrapped, (X,), (jnp.ones_like(X),))[1] == X.size


def test_sizes_that_depend_on_what_is_differentiated_are_integers():
    q = codes(X)

    def loss(x: jax.Array) -> jax.Array:
        first = (x > 0).sum(dtype=jnp.int32) % SIDE
        sizes = jnp.stack([first, SIDE - first])
        y = matmul.grouped_matmul(q, EXPERTS, sizes).astype(jnp.float32)
        return x.sum() + y.sum()

    for derivative in ("grad", "jitted grad"):
        got = DERIVATIVES[derivative](loss, X)
        np.testing.assert_array_equal(got, jnp.ones_like(X))


def test_codes_that_are_laid_out_anew_are_still_codes():
    def loss(x: jax.Array) -> jax.Array:
        return total(quant.contraction_minor(codes(x)).dequantize())

    with pytest.raises(TypeError, match=r"^QTensor.dequantize has no derivative"):
        jax.grad(loss)(X)


def test_scales_may_be_trained():
    # data * scale is linear in the scale, whose cotangent is float32.
    def loss(scale: jax.Array) -> jax.Array:
        return (QTensor(W.data, scale, W.tile).dequantize() * X).sum()

    expected = (np.asarray(W.data, np.float64) * np.asarray(X, np.float64)).sum()
    for wrap in (lambda f: f, jax.jit):
        got = wrap(jax.grad(loss))(W.scale)
        # A float32 sum of 128 * 128 products by pairs: some twenty roundings of 2^-24
        # of magnitudes that add up to a few times the sum.
        np.testing.assert_allclose(got, [[expected]], rtol=1e-5)


def test_a_gradient_rule_of_a_users_own_may_quantize():
    @jax.custom_vjp
    def rounded(x: jax.Array) -> jax.Array:
        return fp8jax.quantize(x).dequantize()

    rounded.defvjp(
        lambda x: (rounded(x), None),
        lambda _, dy: (fp8jax.quantize(dy).dequantize(),),
    )
    got = jax.grad(lambda x: (rounded(x) * X).sum())(X)
    np.testing.assert_array_equal(got, fp8jax.quantize(X).dequantize())
