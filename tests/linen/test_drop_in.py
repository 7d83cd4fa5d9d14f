"""`fp8jax.linen`'s layers are Flax's but for the numbers in their products."""

import dataclasses
import functools
import inspect
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
import fp8jax.linen
from fp8jax import numerics, ops, recipes


def twice_dot(*args, **kwargs):
    """A product of the user's own, told apart from every other."""
    return 2 * jax.lax.dot_general(*args, **kwargs)


def to_float16(*args, dtype=None):
    return tuple(a if a is None else a.astype(jnp.float16) for a in args)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and one value other than the default for each optional argument."""

    needed: dict[str, Any]
    x: tuple[int, ...]
    options: dict[str, dict[str, Any]]

    def make(self, cls, **options):
        return cls(**self.needed | options)


COMMON = {
    "use_bias": {"use_bias": False},
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
    "precision": {"precision": "highest"},
    "kernel_init": {
        "kernel_init": nn.with_partitioning(nn.initializers.normal(0.5), ("in", "out"))
    },
    "bias_init": {"bias_init": nn.initializers.constant(3.0)},
    "name": {"name": "other"},
    "parent": {"parent": None},
}
PROMOTE = {"promote_dtype": {"promote_dtype": to_float16}}
PRODUCTS = {
    "dot_general": {"dot_general": twice_dot},
    "dot_general_cls": {"dot_general_cls": lambda: twice_dot},
}
ATTENTION = Case(
    needed={"num_heads": 4},
    x=(2, 6, 48),
    options={
        **COMMON,
        "kernel_init": {"kernel_init": nn.initializers.normal(0.5)},
        "qkv_features": {"qkv_features": 64},
        "out_features": {"out_features": 24},
        "broadcast_dropout": {"broadcast_dropout": False},
        "dropout_rate": {"dropout_rate": 0.5, "deterministic": False},
        "deterministic": {"deterministic": True, "dropout_rate": 0.5},
        "out_kernel_init": {"out_kernel_init": nn.initializers.normal(0.5)},
        "out_bias_init": {"out_bias_init": nn.initializers.constant(3.0)},
        "attention_fn": {"attention_fn": lambda q, k, v, **_: q + k * v},
        "decode": {"decode": True},
        "normalize_qk": {"normalize_qk": True},
        "force_fp32_for_softmax": {"force_fp32_for_softmax": True},
        "qkv_dot_general": {"qkv_dot_general": twice_dot},
        "out_dot_general": {"out_dot_general": twice_dot},
        "qkv_dot_general_cls": {"qkv_dot_general_cls": lambda: twice_dot},
        "out_dot_general_cls": {"out_dot_general_cls": lambda: twice_dot},
        "qk_attn_weights_einsum_cls": {
            "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
            "attn_weights_value_einsum_cls": lambda: jnp.einsum,
        },
        "attn_weights_value_einsum_cls": {
            "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
            "attn_weights_value_einsum_cls": lambda: jnp.einsum,
        },
    },
)
CASES = {
    "DenseGeneral": Case(
        needed={"features": (5, 30)},
        x=(3, 4, 7, 40),
        options={
            **COMMON,
            **PROMOTE,
            **PRODUCTS,
            "axis": {"axis": (1, -1)},
            "batch_dims": {"batch_dims": (0,)},
        },
    ),
    "Einsum": Case(
        needed={"shape": (4, 40, 30), "einsum_str": "ntd,hdk->nhtk"},
        x=(3, 7, 40),
        options={
            **COMMON,
            **PROMOTE,
            "kernel_init": {
                "kernel_init": nn.with_partitioning(
                    nn.initializers.normal(0.5), ("heads", "in", "out")
                )
            },
            "einsum_str": {"einsum_str": " ntd, hdk -> thnk"},
            "preferred_element_type": {
                "preferred_element_type": jnp.float32,
                "dtype": jnp.bfloat16,
                "use_bias": False,
            },
        },
    ),
    "MultiHeadDotProductAttention": ATTENTION,
    "MultiHeadAttention": ATTENTION,
}
EACH = pytest.mark.parametrize("name", CASES)


def activations(name):
    return jax.random.normal(jax.random.key(7), CASES[name].x)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, case in CASES.items()
        if name != "MultiHeadAttention"  # the same by another name
        for argument in inspect.signature(getattr(nn, name)).parameters
        if argument in case.options or argument not in case.needed
    ],
)
def test_argument_has_its_effect_in_flax(name, argument):
    given = CASES[name].options
    assert argument in given, f"Flax's {name} has grown {argument}: give it a value."
    options = given[argument]
    # A product of one's own excludes a recipe; else, one that quantizes nothing.
    own = argument in PRODUCTS
    flax = CASES[name].make(getattr(nn, name), **options)
    ours = CASES[name].make(
        getattr(fp8jax.linen, name),
        **options,
        recipe=None if own else recipes.bf16(),
    )
    x, keys = activations(name), dict.fromkeys(("params", "dropout"), jax.random.key(0))
    # Flax's attention in bfloat16 mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        expected, variables = flax.init_with_output(keys, x)
        y, our_variables = ours.init_with_output(keys, x)
    # Boxes with partitioning metadata are nodes of the trees.
    chex.assert_trees_all_equal_shapes_and_dtypes(our_variables, variables)
    chex.assert_trees_all_equal((y, our_variables), (expected, variables))
    assert y.dtype == expected.dtype


@EACH
def test_fields_are_those_of_flax_in_their_place_and_of_value_semantics(name):
    ours, flax = (
        inspect.signature(getattr(module, name)).parameters
        for module in (fp8jax.linen, nn)
    )
    for i, (argument, parameter) in enumerate(flax.items()):
        found = ours[argument]
        assert (found.kind, found.default) == (parameter.kind, parameter.default)
        # Flax's own go first, up to those that every Module ends with.
        if argument not in ("parent", "name"):
            assert list(ours).index(argument) == i
    make = functools.partial(CASES[name].make, getattr(fp8jax.linen, name))
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(recipe=recipes.bf16_wgrad())


@EACH
def test_automatic_name_in_a_parent_is_that_of_flax(name):
    def tree_of(module):
        class Parent(nn.Module):
            @nn.compact
            def __call__(self, x):
                return CASES[name].make(getattr(module, name))(x)

        shape = jax.eval_shape(Parent().init, jax.random.key(0), activations(name))
        return jax.tree.map(lambda a: (a.shape, a.dtype), shape)

    assert tree_of(fp8jax.linen) == tree_of(nn)


def slots(name, recipe):
    dot = ops.ByRecipe(ops.dot_general, recipe, None)
    if name == "DenseGeneral":
        return {"dot_general": dot}
    return {"qkv_dot_general": dot, "out_dot_general": dot}


@pytest.mark.parametrize("name", [n for n in CASES if n != "MultiHeadAttention"])
def test_products_and_gradients_are_in_fp8_and_close_to_flax(name):
    recipe, case, x = recipes.deepseek_v3("fp32"), CASES[name], activations(name)
    plain = case.make(getattr(nn, name))
    variables = plain.init(jax.random.key(0), x)

    def traced(layer):
        def run(variables, x):
            y, vjp = jax.vjp(layer.apply, variables, x)
            return y, vjp(jax.random.normal(jax.random.key(1), y.shape))

        return jax.jit(run).trace(variables, x)

    def gradients(program):
        return program.lower().compile()(variables, x)

    program = traced(case.make(getattr(fp8jax.linen, name), recipe=recipe))
    if name != "Einsum":  # Flax's has no slot.
        in_slots = case.make(getattr(nn, name), **slots(name, recipe))
        assert str(program.jaxpr) == str(traced(in_slots).jaxpr)
    ours, expected = gradients(program), gradients(traced(plain))
    assert np.any(ours[0] != expected[0])
    # Up to 2^-4 of each operand: 2^-3 of a product is 18 dB. Attention is products of
    # products, and its softmax's gradient a difference: no crossed wires, no more.
    limit = 10 if "Attention" in name else 18
    largest = max(float(jnp.linalg.norm(e)) for e in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        # The key's bias has no gradient but rounding errors: softmax removes it.
        if jnp.linalg.norm(e) > 1e-3 * largest:
            assert numerics.sqnr_db(a, e) > limit


@EACH
def test_clone_keeps_the_recipe_or_takes_a_new_one(name):
    case, x = CASES[name], activations(name)
    layer = case.make(getattr(fp8jax.linen, name), recipe=recipes.bf16())
    variables = layer.init(jax.random.key(0), x)
    plain = case.make(getattr(nn, name)).apply(variables, x)
    chex.assert_trees_all_equal(layer.clone().apply(variables, x), plain)
    fp8 = layer.clone(recipe=recipes.deepseek_v3()).apply(variables, x)
    assert np.any(fp8 != plain)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("DenseGeneral", {"dot_general": twice_dot}),
        ("DenseGeneral", {"dot_general_cls": lambda: twice_dot}),
        (
            "MultiHeadAttention",
            {"qkv_dot_general": twice_dot, "out_dot_general_cls": lambda: twice_dot},
        ),
    ],
)
def test_own_product_together_with_a_recipe_is_refused(name, own):
    with pytest.raises(ValueError, match=rf"fp8jax\.linen\.{name} takes.*got both"):
        CASES[name].make(getattr(fp8jax.linen, name), **own, recipe=recipes.bf16())


@pytest.mark.parametrize("equation", ["ntd,hdk", "ntd,hdk,k->nt", "ntd->nt"])
def test_bad_equation_is_refused_in_flax_s_words(equation):
    errors = []
    for layers in (fp8jax.linen, nn):
        layer = layers.Einsum((4, 40, 30), equation)
        with pytest.raises(ValueError, match=r"`einsum_str` equation must") as error:
            layer.init(jax.random.key(0), activations("Einsum"))
        errors.append(str(error.value))
    assert errors[0] == errors[1]
