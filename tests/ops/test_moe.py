"""`ops.moe` and the layers made of it are DeepSeek-V3's mixture of experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import fp8jax.linen
import fp8jax.nnx
from fp8jax import numerics, ops, recipes
from fp8jax.testing import assert_same_bits

TOKENS, FEATURES, HIDDEN, EXPERTS = 96, 136, 72, 8
ROUTING = {"top_k": 3, "num_groups": 4, "top_groups": 2, "scale": 2.5}
OFF = recipes.bf16()

pytestmark = pytest.mark.usefixtures("one_device")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def arrays():
    """x, router, bias, and the three weights."""
    shapes = (EXPERTS, FEATURES, HIDDEN), (EXPERTS, HIDDEN, FEATURES)
    return (
        normal(0, TOKENS, FEATURES),
        normal(1, FEATURES, EXPERTS) / 16,
        0.1 * normal(2, EXPERTS),
        normal(3, *shapes[0]) / 12,
        normal(4, *shapes[0]) / 12,
        normal(5, *shapes[1]) / 9,
    )


def every_expert(x, router, bias, w_gate, w_up, w_down):
    """All experts for all tokens, most of them times zero."""
    routed = ops.route(x @ router, bias, **ROUTING)
    mix = jnp.zeros((len(x), EXPERTS))
    mix = mix.at[jnp.arange(len(x))[:, None], routed.experts].set(routed.weights)
    gate, up = (jnp.einsum("tk,ekh->teh", x, w) for w in (w_gate, w_up))
    y = jnp.einsum("teh,ehn->ten", jax.nn.silu(gate) * up, w_down)
    return jnp.einsum("te,ten->tn", mix, y)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, *inputs):
    y, vjp = jax.vjp(fn, *inputs)
    return y, vjp(normal(9, *y.shape))


def output(recipe, *inputs):
    return ops.moe(*inputs, recipe=recipe, **ROUTING)[0]


def test_without_fp8_it_is_all_experts_weighted_and_so_are_gradients():
    ours = value_and_gradients(functools.partial(output, OFF), *arrays())
    theirs = value_and_gradients(every_expert, *arrays())
    for a, e in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        # Sums of at most 3 * 136 products of order one, in float32.
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", ["bf16", "fp8"])
def test_in_fp8_it_is_near(residual):
    recipe = recipes.deepseek_v3(residual=residual)
    ours = value_and_gradients(functools.partial(output, recipe), *arrays())
    theirs = value_and_gradients(every_expert, *arrays())
    for a, e in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        # As the gated MLP alone: chains of up to four products. Not the bias's, zero.
        assert not np.any(e) or numerics.sqnr_db(a, e) > 15
    assert not np.any(ours[1][2])


def one_nan_logit(t=5, expert=6):
    """`arrays` with inf - inf for one logit of one token, and what else is finite."""
    x, router, bias, gate, up, down = arrays()
    x = x.at[:, :2].set(0).at[t, :2].set(1e38)
    router = router.at[0].set(0).at[1].set(0)
    router = router.at[0, expert].set(1e30).at[1, expert].set(-1e30)
    # No expert reads the two features.
    return x, router, bias, gate.at[:, :2].set(0), up.at[:, :2].set(0), down


def nan_token(t=5):
    x, *others = arrays()
    return x.at[t, 3].set(jnp.nan), *others


@pytest.mark.parametrize("recipe", [OFF, None], ids=["bf16", "fp8"])
@pytest.mark.parametrize("make", [one_nan_logit, nan_token])
def test_a_nan_in_routing_is_its_token_s_and_nobody_else_s(make, recipe):
    t, others = 5, np.delete(np.arange(TOKENS), 5)
    inputs = make()
    x, router, bias, *weights = inputs
    logits = x @ router
    assert np.isnan(logits).any(axis=1).nonzero()[0].tolist() == [t]

    y, gradients = value_and_gradients(functools.partial(output, recipe), *inputs)
    _, load = ops.moe(*inputs, recipe=recipe, **ROUTING)
    assert load.sum() == TOKENS * ROUTING["top_k"]
    assert np.all(np.isnan(y[t]))
    # The oracle is of the token's neighbours, without it.
    alone = x.at[t].set(0), router, bias, *weights
    expected, theirs = value_and_gradients(every_expert, *alone)
    dx, drouter, dbias, *dweights = gradients
    for ours, oracle in ((y, expected), (dx, theirs[0])):
        assert np.all(np.isfinite(ours[others]))
        # Gradients of the two large features are of 1e30.
        a, e = ours[others, 2:], oracle[others, 2:]
        # As in the two tests above, of the same arrays.
        if recipe is OFF:
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)
        else:
            assert numerics.sqnr_db(a, e) > 15
    # And FP8's bits are those of the neighbours in a batch that has no NaN.
    clean, _ = value_and_gradients(functools.partial(output, recipe), *alone)
    np.testing.assert_array_equal(y[others], clean[others])
    # What is trained hears of it: the router, and experts that the token went to.
    assert np.isnan(dx[t]).any()
    assert np.isnan(drouter).any()
    assert not np.any(dbias)
    routed = ops.route(logits, bias, **ROUTING).experts[t]
    for dw in dweights:
        broken = np.isnan(dw).any(axis=(1, 2)).nonzero()[0]
        assert set(broken.tolist()) == set(np.asarray(routed).tolist())


def test_a_nan_in_one_column_of_the_router_is_every_token_s():
    x, router, *others = arrays()
    inputs = x, router.at[0, 3].set(jnp.nan), *others
    y, load = ops.moe(*inputs, **ROUTING)
    assert np.all(np.isnan(y))
    assert load.sum() == TOKENS * ROUTING["top_k"]


def test_load_counts_every_token_and_experts_without_one_have_zero_gradients():
    x, router, bias, *weights = arrays()
    bias = bias.at[jnp.array([1, 6])].set(-10.0)  # Never chosen.

    def loss(weights):
        y, load = ops.moe(x, router, bias, *weights, **ROUTING)
        return (y**2).sum(), load

    gradients, load = jax.jit(jax.grad(loss, has_aux=True))(weights)
    assert load.dtype == jnp.int32
    assert load.sum() == TOKENS * ROUTING["top_k"]
    expected = np.bincount(
        np.ravel(ops.route(x @ router, bias, **ROUTING).experts), minlength=EXPERTS
    )
    np.testing.assert_array_equal(load, expected)
    for gradient in gradients:
        np.testing.assert_array_equal(np.any(gradient, axis=(1, 2)), load > 0)
    # Two experts are a group, and without its second a group is no good one.
    assert list(np.flatnonzero(load == 0)) == [0, 1, 6, 7]


def test_nan_in_a_token_stays_in_it():
    x, *rest = arrays()
    run = jax.jit(functools.partial(output, None))
    clean, y = run(x, *rest), run(x.at[7, 3].set(jnp.nan), *rest)
    assert np.isnan(y[7]).all()
    assert_same_bits(jnp.delete(y, 7, axis=0), jnp.delete(clean, 7, axis=0))


def test_each_entry_of_a_vmap_is_routed_by_itself():
    x, *rest = arrays()
    halves = x.reshape(2, TOKENS // 2, FEATURES)
    run = functools.partial(ops.moe, **ROUTING)
    y, load = jax.jit(jax.vmap(lambda x: run(x, *rest)))(halves)
    for i in (0, 1):
        y_i, load_i = jax.jit(run)(halves[i], *rest)
        np.testing.assert_array_equal(load[i], load_i)
        assert numerics.sqnr_db(y[i], y_i) > 45  # Codes at ties.


def test_bad_input_is_named():
    x, router, *rest = arrays()
    with pytest.raises(ValueError, match=r"moe takes x \[..., k\].*got x.shape"):
        ops.moe(x, router[:, 1:], *rest, **ROUTING)
    for layer in (
        lambda **kw: fp8jax.nnx.MoE(FEATURES, HIDDEN, EXPERTS, rngs=nnx.Rngs(0), **kw),
        lambda **kw: fp8jax.linen.MoE(HIDDEN, EXPERTS, **kw).init(jax.random.key(0), x),
    ):
        with pytest.raises(ValueError, match=r"MoE takes experts in.*num_groups=3"):
            layer(top_k=2, num_groups=3)


def nnx_layer(**options):
    options = {**ROUTING, "num_shared": 2, "rngs": nnx.Rngs(0), **options}
    layer = fp8jax.nnx.MoE(FEATURES, HIDDEN, EXPERTS, **options)
    layer.router.bias[...] = 0.1 * normal(2, EXPERTS)
    return layer


@pytest.mark.interop
def test_nnx_layer_is_the_one_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip(
        "transformers.models.deepseek_v3.modeling_deepseek_v3"
    )
    config = transformers.DeepseekV3Config(
        hidden_size=FEATURES,
        moe_intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ROUTING["top_k"],
        n_group=ROUTING["num_groups"],
        topk_group=ROUTING["top_groups"],
        routed_scaling_factor=ROUTING["scale"],
        n_shared_experts=2,
    )
    config._experts_implementation = "eager"
    theirs, ours = modeling.DeepseekV3MoE(config), nnx_layer(recipe=OFF)
    ours.shared.recipe = OFF
    state = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(ours)))
    experts, shared = (
        {name: side["kernel"].swapaxes(-1, -2) for name, side in state[part].items()}
        for part in ("experts", "shared")
    )
    for to, value in (
        (theirs.gate.weight, state["router"]["kernel"].T),
        (theirs.gate.e_score_correction_bias, state["router"]["bias"]),
        (
            theirs.experts.gate_up_proj,
            np.concatenate([experts["gate"], experts["up"]], axis=1),
        ),
        (theirs.experts.down_proj, experts["down"]),
        (theirs.shared_experts.gate_proj.weight, shared["gate"]),
        (theirs.shared_experts.up_proj.weight, shared["up"]),
        (theirs.shared_experts.down_proj.weight, shared["down"]),
    ):
        to.data.copy_(torch.tensor(value))
    x = normal(0, 2, TOKENS // 2, FEATURES)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(x))).numpy()
    # Float32 sums of at most 136 products of order one, in PyTorch's order: 2^-17 of
    # their magnitudes, which add up to some 10.
    np.testing.assert_allclose(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_nnx_layer_is_the_function_and_the_shared_experts():
    layer, x = nnx_layer(), normal(0, 2, TOKENS // 2, FEATURES)
    state = nnx.to_pure_dict(nnx.state(layer))
    assert jax.tree.map(lambda a: (a.shape, str(a.dtype)), state) == {
        "router": {
            "kernel": ((FEATURES, EXPERTS), "float32"),
            "bias": ((EXPERTS,), "float32"),
            "load": ((EXPERTS,), "int32"),
        },
        "experts": {
            "gate": {"kernel": ((EXPERTS, FEATURES, HIDDEN), "float32")},
            "up": {"kernel": ((EXPERTS, FEATURES, HIDDEN), "float32")},
            "down": {"kernel": ((EXPERTS, HIDDEN, FEATURES), "float32")},
        },
        "shared": {
            "gate": {"kernel": ((FEATURES, 2 * HIDDEN), "float32")},
            "up": {"kernel": ((FEATURES, 2 * HIDDEN), "float32")},
            "down": {"kernel": ((2 * HIDDEN, FEATURES), "float32")},
        },
    }
    kernels = [state["experts"][name]["kernel"] for name in ("gate", "up", "down")]
    for kernel in kernels:  # Each expert's has the variance of a layer of its own.
        # A variance of n normal numbers is off by sqrt(2 / n), here 0.5 %: ten times
        # that.
        np.testing.assert_allclose(kernel.var(), 1 / kernel.shape[1], rtol=0.05)
    router = state["router"]
    y, load = ops.moe(x, router["kernel"], router["bias"], *kernels, **ROUTING)
    assert_same_bits(layer(x), y + layer.shared(x))
    np.testing.assert_array_equal(layer.router.load[...], load)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert set(params["router"]) == {"kernel"}


def linen_variables(layer):
    state = nnx.to_pure_dict(nnx.state(layer))
    router = state.pop("router")
    params = {**state, "router": {"kernel": router.pop("kernel")}}
    return {"params": params, "router": {"router": router}}


def test_linen_layer_has_the_bits_of_nnx_s():
    layer, x = nnx_layer(), normal(0, 2, TOKENS // 2, FEATURES)
    variables = linen_variables(layer)
    linen = fp8jax.linen.MoE(HIDDEN, EXPERTS, num_shared=2, **ROUTING)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(linen.init, jax.random.key(0), x))
    assert shapes == jax.tree.map(jnp.shape, variables)

    def loss(params, router):
        y, updated = linen.apply(
            {"params": params, "router": router}, x, mutable=["router"]
        )
        return (y**2).sum(), updated["router"]["router"]

    (value, router), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        *variables.values()
    )
    theirs, of_theirs = nnx.jit(nnx.value_and_grad(lambda m, x: (m(x) ** 2).sum()))(
        layer, x
    )
    assert_same_bits((value, router["load"]), (theirs, layer.router.load[...]))
    assert_same_bits(gradients, nnx.to_pure_dict(of_theirs))
    assert_same_bits(router["bias"], variables["router"]["router"]["bias"])
    # Without the collection mutable the load is not kept.
    assert linen.apply(variables, x).shape == x.shape


def test_balance_moves_every_bias_by_its_own_load():
    class Two(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx_layer(), nnx_layer()])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Two(), normal(0, TOKENS, FEATURES)
    model(x)
    before = [layer.router.bias[...] for layer in model.layers]
    loads = [layer.router.load[...] for layer in model.layers]
    assert not np.array_equal(*loads)
    nnx.jit(fp8jax.nnx.balance, static_argnums=1)(model, 0.5)
    collection = {
        f"layer_{i}": {"router": {"bias": bias, "load": load}}
        for i, (bias, load) in enumerate(zip(before, loads, strict=True))
    }
    moved = fp8jax.linen.balance(collection, 0.5)
    for i, layer in enumerate(model.layers):
        expected = ops.balanced_bias(before[i], loads[i], 0.5)
        assert_same_bits(layer.router.bias[...], expected)
        assert_same_bits(moved[f"layer_{i}"]["router"]["bias"], expected)
        assert_same_bits(moved[f"layer_{i}"]["router"]["load"], loads[i])


def test_nnx_layers_stacked_and_recomputed_are_those_one_by_one():
    x = normal(0, TOKENS, FEATURES)

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx_layer(rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def run(layer, x):
        return x + layer(x)

    layers = stack(nnx.Rngs(0))
    assert layers.experts.gate.kernel.shape == (2, EXPERTS, FEATURES, HIDDEN)
    y = run(layers, x)
    graph, state = nnx.split(layers)
    for i in range(2):
        layer = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
        x = jax.jit(lambda x, f=layer: x + ops_of(f, x))(x)
    # Codes at ties.
    assert numerics.sqnr_db(y, x) > 45
    assert layers.router.load.shape == (2, EXPERTS)
    assert np.all(layers.router.load[...].sum(-1) == TOKENS * ROUTING["top_k"])
    fp8jax.nnx.balance(layers, 0.5)
    assert layers.router.bias.shape == (2, EXPERTS)


def ops_of(layer, x):
    """The layer without its writing of the load."""
    kernels = (layer.experts.gate, layer.experts.up, layer.experts.down)
    router = layer.router.kernel[...], layer.router.bias[...]
    y, _ = ops.moe(x, *router, *(k.kernel[...] for k in kernels), **ROUTING)
    return y + layer.shared(x)


def test_linen_layers_stacked_and_recomputed_keep_a_load_each():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + fp8jax.linen.MoE(HIDDEN, EXPERTS, **ROUTING)(x), None

    stacked = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        length=2,
    )()
    x = normal(0, TOKENS, FEATURES)
    variables = stacked.init(jax.random.key(0), x, None)

    def loss(params):
        rest = {"params": params, "router": variables["router"]}
        (y, _), updated = stacked.apply(rest, x, None, mutable=["router"])
        return (y**2).sum(), updated["router"]

    gradients, router = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    load = router["MoE_0"]["router"]["load"]
    assert np.all(load.sum(-1) == TOKENS * ROUTING["top_k"])
    moved = fp8jax.linen.balance(router, 0.5)["MoE_0"]["router"]["bias"]
    np.testing.assert_array_equal(np.sign(moved), np.sign(36 - np.asarray(load)))


def test_dtypes_and_metadata_are_as_asked():
    layer = nnx_layer(
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        kernel_metadata={"note": "experts"},
        num_shared=0,
    )
    assert layer.shared is None
    assert layer(normal(0, 8, FEATURES)).dtype == jnp.bfloat16
    assert layer.experts.up.kernel.dtype == jnp.float16
    assert layer.experts.up.kernel.get_metadata("note") == "experts"
    assert layer.router.kernel.dtype == jnp.float32
    partitioned = fp8jax.linen.MoE(
        HIDDEN,
        EXPERTS,
        **ROUTING,
        kernel_init=nn.with_partitioning(nn.initializers.ones, ("expert", None, None)),
    )
    shapes = jax.eval_shape(partitioned.init, jax.random.key(0), normal(0, 8, FEATURES))
    spec = nn.get_partition_spec(shapes)["params"]["experts"]["down"]["kernel"]
    assert spec == jax.sharding.PartitionSpec("expert", None, None)
