"""`fp8jax.nnx.Linear` is `flax.nnx.Linear` but for the numbers in its products."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fp8jax
import fp8jax.nnx
from fp8jax import recipes

IN, OUT = 200, 160  # No multiples of a tile.
FLAX_PARAMETERS = inspect.signature(nnx.Linear.__init__).parameters


def twice(*args, **kwargs):
    """A product of the user's own, told apart from every other."""
    return 2 * jax.lax.dot_general(*args, **kwargs)


# One value, other than the default, for each of Flax's optional arguments.
OPTIONS = {
    "use_bias": {"use_bias": False},
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
    "precision": {"precision": "highest"},
    "kernel_init": {"kernel_init": nnx.initializers.normal(0.5)},
    "bias_init": {"bias_init": nnx.initializers.constant(3.0)},
    "dot_general": {"dot_general": twice},
    "promote_dtype": {
        "promote_dtype": lambda args, dtype: tuple(a.astype("float16") for a in args)
    },
    "preferred_element_type": {
        "preferred_element_type": jnp.float32,
        "dtype": jnp.bfloat16,
        "use_bias": False,
    },
    "rngs": {"rngs": nnx.Rngs(5)},
    "kernel_metadata": {"kernel_metadata": {"note": "kernel"}},
    "bias_metadata": {"bias_metadata": {"note": "bias"}},
}


def activations(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape).astype(dtype)


def contract_last(x, kernel, **kwargs):
    return fp8jax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **kwargs)


def layer_of(cls, **options):
    return cls(IN, OUT, **{"rngs": nnx.Rngs(0), **options})


class TestSameAsFlax:
    @pytest.mark.parametrize("name", list(FLAX_PARAMETERS)[3:])
    def test_argument_has_its_effect_in_flax(self, name):
        assert name in OPTIONS, f"Flax's Linear has grown {name}: give it a value here."
        options = OPTIONS[name]
        reference = layer_of(nnx.Linear, **nnx.clone(options))
        # A product of one's own excludes a recipe; else, one that quantizes nothing.
        own = name == "dot_general"
        layer = layer_of(
            fp8jax.nnx.Linear,
            **nnx.clone(options),
            recipe=None if own else recipes.bf16(),
        )
        # The states hold each parameter's metadata as well.
        chex.assert_trees_all_equal(nnx.state(layer), nnx.state(reference))
        for parameter in ("kernel", "bias"):
            ours, flax = getattr(layer, parameter), getattr(reference, parameter)
            assert type(ours) is type(flax)
            if ours is not None:
                assert ours.get_metadata() == flax.get_metadata()
        x = activations(3, IN)
        chex.assert_trees_all_equal(layer(x), reference(x))
        assert layer(x).dtype == reference(x).dtype

    @pytest.mark.parametrize("name", FLAX_PARAMETERS)
    def test_takes_the_argument_of_flax_in_its_place(self, name):
        ours = inspect.signature(fp8jax.nnx.Linear.__init__).parameters
        flax = FLAX_PARAMETERS[name]
        if flax.kind is inspect.Parameter.KEYWORD_ONLY:
            forwarded = ours["options"].kind is inspect.Parameter.VAR_KEYWORD
            assert name in ours or forwarded
        else:
            assert list(ours).index(name) == list(FLAX_PARAMETERS).index(name)
            assert (ours[name].kind, ours[name].default) == (flax.kind, flax.default)

    def test_every_attribute_of_flax_is_there(self):
        flax, ours = layer_of(nnx.Linear), layer_of(fp8jax.nnx.Linear)
        missing = [name for name in vars(flax) if not hasattr(ours, name)]
        assert not missing

    def test_state_of_flax_loads(self):
        saved = nnx.state(layer_of(nnx.Linear, rngs=nnx.Rngs(1)))
        layer = layer_of(fp8jax.nnx.Linear)
        nnx.update(layer, saved)
        chex.assert_trees_all_equal(nnx.state(layer), saved)

    def test_equal_layers_have_equal_graph_definitions(self):
        # Else `nnx.jit` compiles anew for each layer made, and `nnx.vmap` refuses them.
        make = functools.partial(layer_of, fp8jax.nnx.Linear)
        assert nnx.graphdef(make()) == nnx.graphdef(make())
        assert nnx.graphdef(make()) != nnx.graphdef(make(recipe=recipes.bf16()))

    def test_split_and_merge_keep_the_recipe(self):
        layer = layer_of(fp8jax.nnx.Linear, recipe=recipes.bf16_wgrad())
        merged = nnx.merge(*nnx.split(layer))
        assert merged.recipe == recipes.bf16_wgrad()
        x = activations(3, IN)
        chex.assert_trees_all_equal(merged(x), layer(x))


class TestProduct:
    @pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
    @pytest.mark.parametrize(
        ("dtype", "param_dtype", "use_bias"),
        [
            (jnp.float32, jnp.float32, True),
            (jnp.bfloat16, jnp.float32, True),
            (jnp.bfloat16, jnp.bfloat16, False),
        ],
    )
    def test_output_is_dot_general_to_the_bit(self, wrap, dtype, param_dtype, use_bias):
        layer = layer_of(
            fp8jax.nnx.Linear,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=nnx.initializers.normal(1.0),
        )
        x = activations(2, 5, IN)

        def expected(layer, x):
            y = contract_last(x.astype(dtype), layer.kernel[...].astype(dtype))
            return y + layer.bias[...].astype(dtype) if use_bias else y

        y = wrap(lambda layer, x: layer(x))(layer, x)
        assert y.dtype == dtype
        assert layer.kernel.dtype == param_dtype
        chex.assert_trees_all_equal(y, wrap(expected)(layer, x))

    def test_preferred_element_type_is_the_dtype_out(self):
        layer = layer_of(
            fp8jax.nnx.Linear,
            dtype=jnp.bfloat16,
            preferred_element_type=jnp.float32,
            use_bias=False,
        )
        assert layer(activations(3, IN)).dtype == jnp.float32

    @pytest.mark.parametrize("recipe", [None, recipes.bf16_wgrad()])
    def test_gradients_are_those_of_dot_general(self, recipe):
        layer = layer_of(fp8jax.nnx.Linear, recipe=recipe)
        x, dout = activations(256, IN), activations(256, OUT)

        def loss(layer, x):
            return (layer(x) * dout).sum()

        def expected(kernel, x):
            return (contract_last(x, kernel, recipe=recipe) * dout).sum()

        grads, dx = nnx.grad(loss, argnums=(0, 1))(layer, x)
        kernel_grad, dx_expected = jax.grad(expected, argnums=(0, 1))(
            layer.kernel[...], x
        )
        chex.assert_trees_all_equal(
            (grads["kernel"][...], dx), (kernel_grad, dx_expected)
        )
        # Float32 sums over rows, in whatever order: some ulps.
        chex.assert_trees_all_close(grads["bias"][...], dout.sum(0), rtol=1e-5)

    @pytest.mark.parametrize("recipe", [None, recipes.bf16_wgrad()])
    def test_slot_of_flax_takes_dot_general(self, recipe):
        product = functools.partial(fp8jax.dot_general, recipe=recipe)
        flax_layer = layer_of(nnx.Linear, dot_general=product)
        layer = layer_of(fp8jax.nnx.Linear, recipe=recipe)
        x = activations(3, IN)
        chex.assert_trees_all_equal(flax_layer(x), layer(x))

    def test_recipe_can_be_reassigned(self):
        layer, x = layer_of(fp8jax.nnx.Linear), activations(3, IN)
        fp8 = layer(x)
        layer.recipe = recipes.bf16()
        chex.assert_trees_all_equal(layer(x), layer_of(nnx.Linear)(x))
        assert np.any(layer(x) != fp8)

    def test_trains_under_nnx_jit_and_value_and_grad(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.up = fp8jax.nnx.Linear(128, 256, rngs=rngs)
                self.down = fp8jax.nnx.Linear(256, 128, rngs=rngs)

            def __call__(self, x):
                return self.down(nnx.relu(self.up(x)))

        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(1.0, momentum=0.9), wrt=nnx.Param)
        x = activations(64, 128)
        target = jnp.roll(x, 1, axis=-1)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return jnp.square(model(x) - target).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer)) for _ in range(40)]
        # No bound of an error: that it learns.
        assert losses[-1] < 0.1 * losses[0]


class TestRefusals:
    @pytest.mark.parametrize(
        "ours", [{"recipe": recipes.bf16()}, {"implementation": "xla"}]
    )
    def test_own_product_together_with_a_recipe_is_refused(self, ours):
        with pytest.raises(ValueError, match=r"fp8jax\.nnx\.Linear.*got both"):
            layer_of(fp8jax.nnx.Linear, dot_general=jax.lax.dot_general, **ours)

    def test_unknown_implementation_is_refused(self):
        layer = layer_of(fp8jax.nnx.Linear, implementation="tpu")
        with pytest.raises(ValueError, match="implementation='tpu'"):
            layer(activations(3, IN))

    def test_unknown_argument_is_refused(self):
        with pytest.raises(TypeError, match="no_such_argument"):
            layer_of(fp8jax.nnx.Linear, no_such_argument=1)
