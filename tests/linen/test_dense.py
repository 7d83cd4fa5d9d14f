"""`fp8jax.linen.Dense` is `flax.linen.Dense` but for the numbers in its products."""

import functools
import inspect

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
import fp8jax.linen
from fp8jax import recipes

FEATURES = 160  # No multiple of a tile.
FLAX_PARAMETERS = inspect.signature(nn.Dense).parameters


def twice(*args, **kwargs):
    """A product of the user's own, told apart from every other."""
    return 2 * jax.lax.dot_general(*args, **kwargs)


# One value, other than the default, for each of Flax's arguments.
OPTIONS = {
    "features": {},
    "use_bias": {"use_bias": False},
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
    "precision": {"precision": "highest"},
    "kernel_init": {"kernel_init": nn.initializers.normal(0.5)},
    "bias_init": {"bias_init": nn.initializers.constant(3.0)},
    "promote_dtype": {
        "promote_dtype": lambda *args, dtype: tuple(
            a.astype(jnp.float16) for a in args if a is not None
        )
    },
    "dot_general": {"dot_general": twice},
    "dot_general_cls": {"dot_general_cls": lambda: twice},
    "name": {"name": "other"},
    "parent": {"parent": None},
}


def activations(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape).astype(dtype)


def contract_last(x, kernel, **kwargs):
    return fp8jax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **kwargs)


def sqnr_db(x, reference) -> float:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    noise = np.square(x - reference).sum()
    if noise == 0:
        return np.inf
    return float(10 * np.log10(np.square(reference).sum() / noise))


class TestSameAsFlax:
    @pytest.mark.parametrize("name", FLAX_PARAMETERS)
    def test_takes_the_argument_of_flax_with_its_default_and_place(self, name):
        ours = inspect.signature(fp8jax.linen.Dense).parameters
        flax = FLAX_PARAMETERS[name]
        assert name in ours
        assert (ours[name].kind, ours[name].default) == (flax.kind, flax.default)
        # Flax's own go first, up to those that every Module ends with.
        if name not in ("parent", "name"):
            assert list(ours).index(name) == list(FLAX_PARAMETERS).index(name)

    @pytest.mark.parametrize("name", FLAX_PARAMETERS)
    def test_argument_has_its_effect_in_flax(self, name):
        assert name in OPTIONS, f"Flax's Dense has grown {name}: give it a value here."
        options = OPTIONS[name]
        x = activations(3, 48)
        reference, variables = nn.Dense(FEATURES, **options).init_with_output(
            jax.random.key(0), x
        )
        # A product of one's own excludes a recipe; else, one that quantizes nothing.
        own = "dot_general" in name
        layer = fp8jax.linen.Dense(
            FEATURES, **options, recipe=None if own else recipes.bf16()
        )
        y, ours = layer.init_with_output(jax.random.key(0), x)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, variables)
        chex.assert_trees_all_equal((y, ours), (reference, variables))
        assert y.dtype == reference.dtype

    def test_partitioning_metadata_is_kept(self):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        key, x = jax.random.key(0), activations(3, 48)
        ours = fp8jax.linen.Dense(FEATURES, kernel_init=init).init(key, x)
        flax = nn.Dense(FEATURES, kernel_init=init).init(key, x)
        chex.assert_trees_all_equal(ours, flax)
        assert ours["params"]["kernel"].names == ("embed", "mlp")

    def test_automatic_name_in_a_parent_is_that_of_flax(self):
        def tree_of(dense):
            class Parent(nn.Module):
                @nn.compact
                def __call__(self, x):
                    return dense(16)(dense(32)(x))

            return Parent().init(jax.random.key(0), activations(3, 48))

        chex.assert_trees_all_equal(tree_of(fp8jax.linen.Dense), tree_of(nn.Dense))

    def test_checkpoint_of_flax_loads(self):
        x = activations(3, 48)
        saved = flax.serialization.to_bytes(
            nn.Dense(FEATURES).init(jax.random.key(1), x)
        )
        layer = fp8jax.linen.Dense(FEATURES)
        template = layer.init(jax.random.key(0), x)
        loaded = flax.serialization.from_bytes(template, saved)
        chex.assert_trees_all_equal(
            loaded, nn.Dense(FEATURES).init(jax.random.key(1), x)
        )
        assert layer.apply(loaded, x).shape == (3, FEATURES)

    def test_equal_layers_compare_and_hash_equal(self):
        # Else `jax.jit` compiles anew for each Module given as a static argument.
        make = functools.partial(fp8jax.linen.Dense, FEATURES)
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make() != make(recipe=recipes.bf16_wgrad())

    def test_clone_keeps_the_recipe_or_takes_a_new_one(self):
        x = activations(3, 48)
        layer = fp8jax.linen.Dense(FEATURES, recipe=recipes.bf16())
        variables = layer.init(jax.random.key(0), x)
        plain = layer.apply(variables, x)
        chex.assert_trees_all_equal(layer.clone().apply(variables, x), plain)
        fp8 = layer.clone(recipe=recipes.deepseek_v3()).apply(variables, x)
        expected = fp8jax.linen.Dense(FEATURES).apply(variables, x)
        chex.assert_trees_all_equal(fp8, expected)
        assert np.any(fp8 != plain)


class TestProduct:
    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    @pytest.mark.parametrize(
        ("dtype", "param_dtype", "use_bias"),
        [
            (jnp.float32, jnp.float32, True),
            (jnp.bfloat16, jnp.float32, True),
            (jnp.bfloat16, jnp.bfloat16, False),
        ],
    )
    def test_output_is_dot_general_to_the_bit(self, wrap, dtype, param_dtype, use_bias):
        layer = fp8jax.linen.Dense(
            FEATURES,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=nn.initializers.normal(1.0),
        )
        x = activations(2, 5, 200)
        variables = layer.init(jax.random.key(0), x)
        params = variables["params"]

        def expected(x, params):
            y = contract_last(x.astype(dtype), params["kernel"].astype(dtype))
            return y + params["bias"].astype(dtype) if use_bias else y

        y = wrap(layer.apply)(variables, x)
        assert y.dtype == dtype
        assert params["kernel"].dtype == param_dtype
        chex.assert_trees_all_equal(y, wrap(expected)(x, params))

    @pytest.mark.parametrize(
        "recipe",
        [recipes.deepseek_v3(), recipes.deepseek_v3("fp32"), recipes.bf16_wgrad()],
        ids=["pow2", "fp32", "bf16_wgrad"],
    )
    def test_gradients_are_those_of_dot_general_and_close_to_flax(self, recipe):
        layer = fp8jax.linen.Dense(FEATURES, recipe=recipe)
        x = activations(256, 200)
        variables = layer.init(jax.random.key(0), x)
        dout = activations(256, FEATURES)

        def gradients(apply):
            return jax.vjp(apply, variables["params"], x)[1](dout)

        def expected(params, x):
            return contract_last(x, params["kernel"], recipe=recipe) + params["bias"]

        ours = gradients(lambda p, x: layer.apply({"params": p}, x))
        chex.assert_trees_all_equal(ours, gradients(expected))
        plain = gradients(lambda p, x: nn.Dense(FEATURES).apply({"params": p}, x))
        chex.assert_trees_all_equal(ours[0]["bias"], plain[0]["bias"])
        # Two operands, each with an error that is even over a step of 2^-3 of itself at
        # most: rms 2^-3 / sqrt(12) each, 25.8 dB together.
        assert sqnr_db(ours[0]["kernel"], plain[0]["kernel"]) > 25
        assert sqnr_db(ours[1], plain[1]) > 25

    @pytest.mark.parametrize(
        "given",
        [{"dot_general": 1}, {"dot_general_cls": 1}],
        ids=lambda g: next(iter(g)),
    )
    @pytest.mark.parametrize("recipe", [None, recipes.bf16_wgrad()])
    def test_slots_of_flax_take_dot_general(self, given, recipe):
        product = functools.partial(fp8jax.dot_general, recipe=recipe)
        slot = next(iter(given))
        flax_layer = nn.Dense(
            FEATURES,
            **{slot: product if slot == "dot_general" else lambda: product},
        )
        x = activations(3, 200)
        variables = flax_layer.init(jax.random.key(0), x)
        layer = fp8jax.linen.Dense(FEATURES, recipe=recipe)
        chex.assert_trees_all_equal(
            flax_layer.apply(variables, x), layer.apply(variables, x)
        )

    def test_dense_general_of_flax_takes_dot_general(self):
        layer = nn.DenseGeneral((4, 32), axis=(-2, -1), dot_general=fp8jax.dot_general)
        x = activations(3, 5, 4, 40)
        variables = layer.init(jax.random.key(0), x)
        params = variables["params"]
        y = contract_last(x.reshape(3, 5, 160), params["kernel"].reshape(160, 128))
        expected = y.reshape(3, 5, 4, 32) + params["bias"]
        chex.assert_trees_all_equal(layer.apply(variables, x), expected)

    def test_works_under_scan_and_remat(self):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.remat(fp8jax.linen.Dense)(x.shape[-1])(x), None

        model = nn.scan(
            Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )()
        x = activations(8, 128)
        variables = model.init(jax.random.key(0), x, None)

        @jax.jit
        def loss(variables):
            return jnp.square(model.apply(variables, x, None)[0]).mean()

        grads = jax.grad(loss)(variables)
        chex.assert_tree_all_finite(grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, variables)
        assert all(np.any(g != 0) for g in jax.tree.leaves(grads))


class TestRefusals:
    @pytest.mark.parametrize("slot", ["dot_general", "dot_general_cls"])
    @pytest.mark.parametrize(
        "ours", [{"recipe": recipes.bf16()}, {"implementation": "xla"}]
    )
    def test_own_product_together_with_a_recipe_is_refused(self, slot, ours):
        with pytest.raises(ValueError, match=r"fp8jax\.linen\.Dense.*got both"):
            fp8jax.linen.Dense(FEATURES, **{slot: jax.lax.dot_general}, **ours)

    def test_unknown_implementation_is_refused(self):
        layer = fp8jax.linen.Dense(FEATURES, implementation="tpu")
        with pytest.raises(ValueError, match="implementation='tpu'"):
            layer.init(jax.random.key(0), activations(3, 48))

    def test_what_is_no_recipe_is_refused(self):
        layer = fp8jax.linen.Dense(FEATURES, recipe="deepseek_v3")
        with pytest.raises(ValueError, match="recipe='deepseek_v3'"):
            layer.init(jax.random.key(0), activations(3, 48))
