"""Every op in a `shard_map`: over all or some axes, types checked or not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _dispatch, numerics, ops, recipes
from fp8jax.ops._partly_manual import partitioned_mesh

M, K, HIDDEN, EXPERTS = 512, 128, 256, 4
DIMS = (((1,), (0,)), ((), ()))

on_hopper = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)


def normal(seed, *shape, size=1.0):
    return size * jax.random.normal(jax.random.key(seed), shape)


def weights(*lead):
    into, out_of = (*lead, K, HIDDEN), (*lead, HIDDEN, K)
    return [
        normal(i, *s, size=s[-2] ** -0.5) for i, s in enumerate((into, into, out_of))
    ]


def sizes(x):
    rows = len(x)
    return jnp.array([rows // 4, 0, rows // 2, rows - rows // 4 - rows // 2])


def dense(x, w, **how):
    return fp8jax.dot_general(x, w, DIMS, **how)


def ragged(x, w, **how):
    return fp8jax.ragged_dot(x, w, sizes(x), **how)


def swiglu(x, gate, up, down, **how):
    return ops.swiglu_mlp(x, gate, up, down, **how)


def rms_norm(x, scale, *w, **how):
    return jnp.concatenate(ops.rms_norm_dot(x, scale, *w, epsilon=1e-6, **how), axis=1)


def experts(x, gate, up, down, **how):
    return ops.expert_mlp(x, gate, up, down, sizes(x), **how)


def mixture(x, router, *w, **how):
    return ops.moe(x, router, jnp.zeros(EXPERTS), *w, top_k=2, **how)[0]


X = normal(9, M, K)
OPS = {
    "dense": (dense, weights()[:1]),
    "ragged": (ragged, weights(EXPERTS)[:1]),
    "swiglu": (swiglu, weights()),
    "rms_norm": (rms_norm, [1 + 0.1 * normal(8, K), *weights()[:2]]),
    "experts": (experts, weights(EXPERTS)),
    "mixture": (mixture, [normal(7, K, EXPERTS, size=K**-0.5), *weights(EXPERTS)]),
}
RECIPES = {
    "default": recipes.deepseek_v3(),
    "codes kept": recipes.deepseek_v3(residual="fp8"),
    "recomputed": recipes.deepseek_v3(residual="recompute"),
}


def mesh_of(*shape):
    axes = ("a", "b", "c")[: len(shape)]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))


def mapped(op, mesh, manual, check_vma):
    """`op` of every device's, or group's, rows of x."""

    def run(x, *others):
        specs = P("a"), *[P()] * len(others)
        return jax.shard_map(
            op,
            mesh=mesh,
            in_specs=specs,
            out_specs=P("a"),
            check_vma=check_vma,
            axis_names=manual,
        )(x, *others)

    return run


def value_and_gradients(op, *args):
    def loss(*args):
        y = op(*args)
        return jnp.sum(jnp.sin(y)), y

    every = tuple(range(len(args)))
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*args)
    return y, *gradients


def part_by_part(op, parts):
    def run(x, *others):
        y = jax.lax.map(
            lambda part: op(part, *others), x.reshape(parts, -1, x.shape[1])
        )
        return y.reshape(-1, *y.shape[2:])

    return run


def check(name, mesh, manual, *, check_vma, recipe="default"):
    op, others = OPS[name]
    fp8 = functools.partial(op, recipe=RECIPES[recipe])
    found = value_and_gradients(mapped(fp8, mesh, manual, check_vma), X, *others)
    parts = part_by_part(fp8, mesh.shape["a"])
    with jax.default_device(jax.devices()[0]):
        wanted = value_and_gradients(parts, X, *others)
        plain = part_by_part(
            functools.partial(op, recipe=recipes.bf16()), mesh.shape["a"]
        )
        exact = value_and_gradients(plain, X, *others)
    for got, same, near in zip(found, wanted, exact, strict=True):
        # Gradients of shared values are sums over devices, in another order; in fused
        # ops a code may then move by a step where a value lies at a tie.
        assert numerics.relative_error(got, same) < 2**-10
        # Three products in a row of operands off by up to 2^-4 of themselves.
        assert numerics.sqnr_db(near, got) > 15


@pytest.mark.parametrize("name", OPS)
def test_over_the_whole_mesh_with_types_checked(name):
    check(name, mesh_of(8), {"a"}, check_vma=True)


@pytest.mark.parametrize(
    ("name", "recipe"), [("dense", "codes kept"), ("swiglu", "recomputed")]
)
def test_other_residuals_with_types_checked(name, recipe):
    check(name, mesh_of(8), {"a"}, check_vma=True, recipe=recipe)


@pytest.mark.parametrize("name", OPS)
def test_over_some_axes_with_types_checked(name):
    check(name, mesh_of(2, 4), {"a"}, check_vma=True)


def test_over_some_axes_with_types_unchecked():
    check("dense", mesh_of(2, 4), {"a"}, check_vma=False)


@pytest.mark.parametrize(("order", "check_vma"), [("bac", True), ("cba", False)])
def test_the_partitioner_splits_the_axes_that_are_left(order, check_vma):
    """As in a two-layer network split by rows, columns and contractions at once.

    Sums are over one of the axes left, whichever way the partitioner numbers devices.
    """
    mesh = jax.make_mesh((2, 2, 2), tuple(order), axis_types=(AxisType.Auto,) * 3)
    specs = P("b", None), P("b", "c"), P("c", "b")

    def network(dot, constrain):
        def run(x, up, down):
            x, up, down = map(constrain, (x, up, down), specs)
            h = constrain(jnp.tanh(dot(x, up)), P("b", "c"))
            return constrain(dot(h, down), P("b", None))

        return run

    def collectives(fn, *args):
        run = jax.jit(jax.grad(lambda *a: fn(*a).sum(), (0, 1, 2)))
        text = str(run.lower(*args).compile().as_text())
        names = "all-gather", "all-reduce", "all-to-all", "collective-permute"
        # Where a device keeps a part of a sum, it may be made alone. Sums of several
        # arrays may be one instruction: arrays count.
        text = text.replace(" reduce-scatter(", " all-reduce(")
        return {
            name: sum(
                len(re.findall(r"[a-z]\w*\[", results))
                for results in re.findall(rf"= (.*?) {name}\(", text)
            )
            for name in names
        }

    constrain = jax.lax.with_sharding_constraint
    up, down = normal(1, 256, 512, size=2**-4), normal(2, 512, 256, size=2**-5)
    args = normal(0, 512, 256), up, down
    fp8 = mapped(network(dense, constrain), mesh, {"a"}, check_vma)
    found = value_and_gradients(fp8, *args)
    alone = part_by_part(network(dense, lambda x, _: x), 2)
    wanted = value_and_gradients(alone, *args)
    for got, same in zip(found, wanted, strict=True):
        # As in `check`: codes at ties.
        assert numerics.relative_error(got, same) < 2**-10
    plain = mapped(network(jnp.matmul, constrain), mesh, {"a"}, check_vma)
    assert collectives(fp8, *args) == collectives(plain, *args)


def test_a_compass_that_does_not_tell_is_known_for_it():
    mesh = jax.sharding.AbstractMesh(
        (2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Manual, *[AxisType.Auto] * 2)
    )
    free = jax.sharding.AbstractMesh((2, 2), ("c", "b"))
    found = partitioned_mesh(mesh, jax.sharding.NamedSharding(free, P("b", "c")))
    assert found == free
    for spec in (P(), P("b", None), P(None, ("b", "c"))):
        sharding = jax.sharding.NamedSharding(free, spec)
        assert partitioned_mesh(mesh, sharding) is None


@on_hopper
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_kernels_run_on_each_device(name, check_vma, monkeypatch):
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    op, others = OPS[name]
    args = [jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for v in (X, *others)]
    if name == "mixture":
        args[1] = others[0]  # The router.
    run = mapped(op, mesh_of(8), {"a"}, check_vma)
    every = tuple(range(len(args)))

    def gradients(*args):
        return jax.grad(lambda *args: run(*args).astype(jnp.float32).sum(), every)(
            *args
        )

    traced = jax.jit(gradients).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text
    # XLA's own product of codes; a mixture's router is a product in float32.
    assert text.count("stablehlo.dot_general") == (3 if name == "mixture" else 0)


@on_hopper
def test_over_some_axes_no_kernel_is_where_xla_would_gather_for_it(monkeypatch):
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    op, others = OPS["dense"]
    args = [jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for v in (X, *others)]
    run = mapped(op, mesh_of(2, 4), {"a"}, True)
    traced = jax.jit(jax.grad(lambda *args: run(*args).astype(float).sum())).trace(
        *args
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" in text
    assert "mosaic_gpu" not in text


def test_values_of_one_device_are_those_of_the_whole():
    """A row of a dense product does not depend on the rows beside it."""
    w = OPS["dense"][1][0]
    y = jax.jit(mapped(dense, mesh_of(8), {"a"}, True))(X, w)
    # The same codes: 128 float32 products, which XLA may add in another order.
    np.testing.assert_allclose(y, dense(X, w), rtol=1e-5, atol=1e-6)
