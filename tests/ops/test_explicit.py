"""Arrays whose types hold their shardings: results are typed as the plain ones."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
import fp8jax.linen
import fp8jax.nnx
from fp8jax import ops, recipes

K, HIDDEN = 512, 1024
DIMS = (((2,), (0,)), ((), ()))
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


def normal(seed, *shape, size=1.0):
    return size * jax.random.normal(jax.random.key(seed), shape)


X = normal(0, 4, 32, K)
UP, GATE, DOWN = (
    normal(i, *s, size=s[0] ** -0.5)
    for i, s in enumerate([(K, HIDDEN), (K, HIDDEN), (HIDDEN, K)])
)


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def put(tree, spec):
    return jax.tree.map(lambda v: jax.device_put(v, spec), tree)


def alone(tree):
    """The same arrays on one device, of no sharding."""
    return jax.tree.map(lambda v: jnp.asarray(np.asarray(v)), tree)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def gradient(fn, *args):
    every = tuple(range(len(args)))
    return jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), every)(*args)


def close(got, wanted):
    # The order of sums over devices; see tests/transform/test_sharding.py.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert fp8jax.numerics.relative_error(alone(a), b) < 2**-7.5


def dense(dot, **how):
    return lambda x, w: dot(x, w, DIMS, **how)


def einsum(dot, **how):
    return lambda x, w: dot("btk,kn->nbt", x, w, **how)


SPLITS = {
    "data": (P("a"), P(), {}),
    "columns": (P("a"), P(None, "b"), {}),
    "rows and columns": (P("a", "b"), P(), {}),
    "contraction": (P("a", None, "b"), P("b"), {"out_sharding": P("a", None, None)}),
    "scattered": (P("a", None, "b"), P("b"), {"out_sharding": P("a", "b", None)}),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.usefixtures("mesh")
def test_dot_general_is_typed_as_lax_s(split):
    x_spec, w_spec, how = split
    x, w = put(X, x_spec), put(UP, w_spec)
    ours, plain = dense(fp8jax.dot_general, **how), dense(jax.lax.dot_general, **how)
    y, dxw = jax.jit(ours)(x, w), jax.jit(functools.partial(gradient, ours))(x, w)
    assert types(y) == types(jax.jit(plain)(x, w))
    assert types(dxw) == types(jax.jit(functools.partial(gradient, plain))(x, w))
    whole = dense(fp8jax.dot_general)
    close(y, whole(X, UP))
    close(dxw, gradient(whole, X, UP))


@pytest.mark.usefixtures("mesh")
def test_outside_of_jit_too():
    x, w = put(X, P("a")), put(UP, P(None, "b"))
    y = dense(fp8jax.dot_general)(x, w)
    assert types(y) == types(dense(jax.lax.dot_general)(x, w))
    ours = gradient(dense(fp8jax.dot_general), x, w)
    assert types(ours) == types(gradient(dense(jax.lax.dot_general), x, w))


@pytest.mark.usefixtures("mesh")
def test_what_lax_refuses_is_refused_in_its_words():
    x, w = put(X, P("a", None, "b")), put(UP, P("b"))
    with pytest.raises(Exception, match="ambiguous") as wanted:
        dense(jax.lax.dot_general)(x, w)
    with pytest.raises(wanted.type, match="ambiguous"):
        dense(fp8jax.dot_general)(x, w)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("spec", [None, P(None, "a", None)])
def test_einsum_is_typed_as_jnp_s(spec):
    x, w = put(X, P("a")), put(UP, P())
    y = einsum(ops.einsum, out_sharding=spec)(x, w)
    assert types(y) == types(einsum(jnp.einsum, out_sharding=spec)(x, w))
    close(y, einsum(ops.einsum)(X, UP))


def test_some_axes_explicit():
    kinds = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=kinds)
    with jax.set_mesh(mesh):
        x, w = put(X, P("a")), jax.device_put(UP, NamedSharding(mesh, P(None, "b")))
        y = jax.jit(dense(fp8jax.dot_general))(x, w)
        assert types(y) == types(jax.jit(dense(jax.lax.dot_general))(x, w))
    close(y, dense(fp8jax.dot_general)(X, UP))


@pytest.mark.usefixtures("mesh")
def test_in_the_body_of_a_shard_map_types_are_one_device_s():
    run = jax.shard_map(
        dense(fp8jax.dot_general),
        in_specs=(P("a"), P(None, "b")),
        out_specs=P("a", None, "b"),
    )
    x, w = put(X, P("a")), put(UP, P(None, "b"))
    assert types(run(x, w)) == types(dense(jax.lax.dot_general)(x, w))
    close(jax.jit(run)(x, w), dense(fp8jax.dot_general)(X, UP))
    # Over one axis the other stays explicit.
    some = jax.shard_map(
        dense(fp8jax.dot_general),
        in_specs=(P("a"), P()),
        out_specs=P("a"),
        axis_names={"a"},
    )
    assert types(jax.jit(some)(x, w)) == types(dense(jax.lax.dot_general)(x, w))
    close(jax.jit(some)(x, w), dense(fp8jax.dot_general)(X, UP))


SHARDED = {"gate": P(None, "b"), "up": P(None, "b"), "down": P("b")}


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("jitted", [True, False])
def test_fused_ops_split_by_rows_and_hidden_features(jitted):
    x, scale = put(X, P("a")), put(jnp.ones(K), P())
    w = [put(v, s) for v, s in zip((GATE, UP, DOWN), SHARDED.values(), strict=True)]
    wrap = jax.jit if jitted else lambda fn: fn
    y = wrap(ops.swiglu_mlp)(x, *w)
    assert jax.typeof(y).sharding.spec == P("a", None, None)
    close(y, ops.swiglu_mlp(X, GATE, UP, DOWN))

    def normalized(x, scale, *w):
        return ops.rms_norm_dot(x, scale, *w, epsilon=1e-6)

    ys = wrap(normalized)(x, scale, *w[:2])
    assert [jax.typeof(y).sharding.spec for y in ys] == [P("a", None, "b")] * 2
    close(ys, normalized(X, jnp.ones(K), GATE, UP))


@pytest.mark.usefixtures("mesh")
def test_gradients_of_fused_ops_are_typed_as_what_they_are_of():
    x = put(X, P("a"))
    w = [put(v, s) for v, s in zip((GATE, UP, DOWN), SHARDED.values(), strict=True)]
    got = jax.jit(functools.partial(gradient, ops.swiglu_mlp))(x, *w)
    assert types(got) == types((x, *w))
    close(got, gradient(ops.swiglu_mlp, X, GATE, UP, DOWN))


def linear(layers, kernel, x):
    if layers in (nnx, fp8jax.nnx):
        layer = layers.Linear(*kernel.shape, rngs=nnx.Rngs(0), dtype=jnp.float32)
        layer.kernel.set_value(kernel)
        return layer(x)
    layer = layers.Dense(kernel.shape[1], dtype=jnp.float32)
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}}
    return layer.apply(variables, x)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize(
    ("ours", "theirs"), [(fp8jax.nnx, nnx), (fp8jax.linen, flax.linen)]
)
@pytest.mark.parametrize("stored", [False, True])
def test_layers_are_typed_as_flax_s(ours, theirs, stored):
    x, w = put(X, P("a")), put(UP, P(None, "b"))
    kernel = put(fp8jax.quantize(UP, SPEC), P(None, "b")) if stored else w
    y = jax.jit(functools.partial(linear, ours))(kernel, x)
    assert types(y) == types(linear(theirs, w, x))
    close(y, linear(ours, alone(kernel), X))


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("stored", [False, True])
def test_gated_and_normalized_layers(stored):
    def layers(weights, x):
        gate, up, down = weights
        rngs = nnx.Rngs(0)
        mlp = fp8jax.nnx.SwiGLU(K, HIDDEN, rngs=rngs, dtype=jnp.float32)
        for name, w in (("gate", gate), ("up", up), ("down", down)):
            getattr(mlp, name).kernel.set_value(w)
        norm = fp8jax.nnx.RMSNormLinear(K, HIDDEN, rngs=rngs, dtype=jnp.float32)
        norm.linear.kernel.set_value(up)
        return mlp(x), norm(x)

    values = [GATE, UP, DOWN]
    if stored:
        values = [fp8jax.quantize(w, SPEC) for w in values]
    placed = [put(v, s) for v, s in zip(values, SHARDED.values(), strict=True)]
    ys = jax.jit(layers)(placed, put(X, P("a")))
    specs = [jax.typeof(y).sharding.spec for y in ys]
    assert specs == [P("a", None, None), P("a", None, "b")]
    close(ys, layers(values, X))


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("stored", [False, True])
def test_rows_in_groups_are_refused_with_the_way_out(stored):
    w = jnp.ones((4, 128, 128))
    rows, router = put(jnp.ones((256, 128)), P("a")), put(jnp.ones((128, 4)), P())
    experts = put(fp8jax.quantize(w, SPEC) if stored else w, P())
    sizes = put(jnp.full(4, 64), P())
    calls = {
        "ragged_dot": lambda: fp8jax.ragged_dot(rows, put(w, P()), sizes),
        "expert_mlp": lambda: ops.expert_mlp(rows, *[experts] * 3, sizes),
        "moe": lambda: ops.moe(rows, router, sizes * 0.0, *[experts] * 3, top_k=2),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=rf"{name} takes .*shard_map"):
            call()


@pytest.mark.usefixtures("mesh")
def test_a_recipe_without_fp8_is_lax_s_own():
    x, w = put(X, P("a", None, "b")), put(UP, P("b"))
    how = {"out_sharding": P("a", None, None)}
    y = dense(fp8jax.dot_general, recipe=recipes.bf16(), **how)(x, w)
    assert types(y) == types(dense(jax.lax.dot_general, **how)(x, w))


@pytest.mark.parametrize(
    "op",
    [dense(fp8jax.dot_general, out_sharding=P()), einsum(ops.einsum, out_sharding=P())],
)
def test_automatic_shardings_take_no_out_sharding(op):
    with pytest.raises(NotImplementedError, match="with_sharding_constraint"):
        op(X, UP)
