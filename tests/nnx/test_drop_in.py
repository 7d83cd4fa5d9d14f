"""`fp8jax.nnx`'s layers are Flax's but for the numbers in their products."""

import dataclasses
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.nnx
from fp8jax import numerics, ops, recipes


def twice(product):
    """A product of the user's own, told apart from every other."""
    return lambda *args, **kwargs: 2 * product(*args, **kwargs)


twice_dot, twice_einsum = twice(jax.lax.dot_general), twice(jnp.einsum)


def to_float16(args, dtype=None):
    return tuple(a if a is None else a.astype(jnp.float16) for a in args)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and one value other than the default for each optional argument."""

    args: tuple[Any, ...]
    x: tuple[int, ...]
    options: dict[str, dict[str, Any]]
    always: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, cls, **options):
        return cls(*self.args, **{"rngs": nnx.Rngs(0), **self.always, **options})


COMMON = {
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
    "precision": {"precision": "highest"},
    "kernel_init": {"kernel_init": nnx.initializers.normal(0.5)},
    "bias_init": {"bias_init": nnx.initializers.constant(3.0)},
    "rngs": {"rngs": nnx.Rngs(5)},
    "kernel_metadata": {"kernel_metadata": {"out_sharding": (), "note": "kernel"}},
    "bias_metadata": {"bias_metadata": {"note": "bias"}},
}
LINEAR = {
    **COMMON,
    "promote_dtype": {"promote_dtype": to_float16},
    "preferred_element_type": {
        "preferred_element_type": jnp.float32,
        "dtype": jnp.bfloat16,
    },
}
CASES = {
    "LinearGeneral": Case(
        args=((4, 40), (5, 30)),
        x=(3, 4, 7, 40),
        always={"axis": (1, -1)},
        options={
            **LINEAR,
            "axis": {"axis": (-3, -1)},
            "batch_axis": {"batch_axis": {0: 3}},
            "use_bias": {"use_bias": False},
            "dot_general": {"dot_general": twice_dot},
            "dot_general_cls": {"dot_general_cls": lambda: twice_dot},
        },
    ),
    "Einsum": Case(
        args=("ntd,hdk->nhtk", (4, 40, 30)),
        x=(3, 7, 40),
        always={"bias_shape": (4, 30)},
        options={
            **LINEAR,
            "bias_shape": {"bias_shape": None},
            "einsum_op": {"einsum_op": twice_einsum},
        },
    ),
    "MultiHeadAttention": Case(
        args=(4, 48, 64),
        x=(2, 6, 48),
        always={"decode": False},
        options={
            **COMMON,
            "out_features": {"out_features": 24},
            "num_kv_heads": {"num_kv_heads": 2},
            "in_kv_features": {"in_kv_features": 48},
            "broadcast_dropout": {"broadcast_dropout": False},
            "dropout_rate": {"dropout_rate": 0.5, "deterministic": False},
            "deterministic": {"deterministic": True, "dropout_rate": 0.5},
            "out_kernel_init": {"out_kernel_init": nnx.initializers.normal(0.5)},
            "out_bias_init": {"out_bias_init": nnx.initializers.constant(3.0)},
            "use_bias": {"use_bias": False},
            "attention_fn": {"attention_fn": lambda q, k, v, **_: q + k * v},
            "decode": {"decode": True},
            "normalize_qk": {"normalize_qk": True},
            "qkv_promote_dtype": {"qkv_promote_dtype": to_float16},
            "out_promote_dtype": {"out_promote_dtype": to_float16},
            "ln_promote_dtype": {
                "ln_promote_dtype": to_float16,
                "normalize_qk": True,
                "qkv_promote_dtype": to_float16,
                "out_promote_dtype": to_float16,
            },
            "qkv_dot_general": {"qkv_dot_general": twice_dot},
            "out_dot_general": {"out_dot_general": twice_dot},
            "qkv_dot_general_cls": {"qkv_dot_general_cls": lambda: twice_dot},
            "out_dot_general_cls": {"out_dot_general_cls": lambda: twice_dot},
            "keep_rngs": {"keep_rngs": False},
            "out_kernel_metadata": {"out_kernel_metadata": {"note": "out"}},
            "out_bias_metadata": {"out_bias_metadata": {"note": "out"}},
            "query_ln_scale_metadata": {
                "query_ln_scale_metadata": {"note": "q"},
                "normalize_qk": True,
            },
            "key_ln_scale_metadata": {
                "key_ln_scale_metadata": {"note": "k"},
                "normalize_qk": True,
            },
        },
    ),
}
# Slots of Flax's for a product of the user's own, which excludes a recipe.
OWN = ("dot_general", "dot_general_cls", "einsum_op")
EACH = pytest.mark.parametrize("name", CASES)


def flax_parameters(name):
    return inspect.signature(getattr(nnx, name).__init__).parameters


def pair(name, own=False, **options):
    """Flax's layer, and ours with a recipe that quantizes nothing."""
    case = CASES[name]
    recipe = None if own else recipes.bf16()
    flax = case.make(getattr(nnx, name), **nnx.clone(options))
    ours = case.make(getattr(fp8jax.nnx, name), recipe=recipe, **nnx.clone(options))
    return flax, ours


def activations(name, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(7), CASES[name].x).astype(dtype)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, case in CASES.items()
        # Those after self that every layer in CASES is given.
        for argument in list(flax_parameters(name))[1 + len(case.args) :]
    ],
)
def test_argument_has_its_effect_in_flax(name, argument):
    given = CASES[name].options
    assert argument in given, f"Flax's {name} has grown {argument}: give it a value."
    flax, ours = pair(name, own=argument in OWN, **given[argument])
    chex.assert_trees_all_equal(nnx.state(ours), nnx.state(flax))
    for (path, a), (flax_path, b) in zip(
        nnx.to_flat_state(nnx.state(ours)),
        nnx.to_flat_state(nnx.state(flax)),
        strict=True,
    ):
        assert path == flax_path
        assert type(a) is type(b)
        assert a.get_metadata() == b.get_metadata()
    x = activations(name)
    if argument == "decode":
        for layer in (flax, ours):
            layer.init_cache(x.shape)
        x = x[:, :1]
    # Flax's attention in bfloat16 and its options for dtypes mix them.
    with jax.numpy_dtype_promotion("standard"):
        y, expected = ours(x), flax(x)
    assert y.dtype == expected.dtype
    chex.assert_trees_all_equal(y, expected)


@EACH
def test_arguments_are_in_their_place_and_attributes_there(name):
    case, ours = CASES[name], getattr(fp8jax.nnx, name)
    signature = inspect.signature(ours.__init__)
    keyword = {
        key: object()
        for key, p in flax_parameters(name).items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    bound = signature.bind(None, *case.args, **keyword)
    flat = {**bound.arguments, **bound.arguments.get("options", {})}
    assert keyword.items() <= flat.items()
    positional = [
        p
        for p in flax_parameters(name).values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    signature.bind(*positional, rngs=None)
    made, flax = case.make(ours), case.make(getattr(nnx, name))
    assert not [attribute for attribute in vars(flax) if not hasattr(made, attribute)]
    assert nnx.graphdef(made) == nnx.graphdef(case.make(ours))
    assert nnx.graphdef(made) != nnx.graphdef(case.make(ours, recipe=recipes.bf16()))


def replaced(name, recipe):
    """Flax's own layer with our product in its slots."""
    dot = ops.ByRecipe(ops.dot_general, recipe, None)
    slots = {
        "LinearGeneral": {"dot_general": dot},
        "Einsum": {"einsum_op": ops.ByRecipe(ops.einsum, recipe, None)},
        "MultiHeadAttention": {"qkv_dot_general": dot, "out_dot_general": dot},
    }
    return CASES[name].make(getattr(nnx, name), **slots[name])


@EACH
def test_products_and_gradients_are_in_fp8_and_close_to_flax(name):
    recipe = recipes.deepseek_v3("fp32")
    layer = CASES[name].make(getattr(fp8jax.nnx, name), recipe=recipe)
    x = activations(name)

    def gradients(layer):
        graphdef, state = nnx.split(layer)

        def run(state, x):
            y, vjp = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
            return y, vjp(jax.random.normal(jax.random.key(1), y.shape))

        return jax.jit(run).trace(state, x), (state, x)

    (traced, args), (in_slots, _) = gradients(layer), gradients(replaced(name, recipe))
    assert str(traced.jaxpr) == str(in_slots.jaxpr)
    ours = traced.lower().compile()(*args)
    plain_traced, args = gradients(CASES[name].make(getattr(nnx, name)))
    plain = plain_traced.lower().compile()(*args)
    assert np.any(ours[0] != plain[0])
    # Up to 2^-4 of each operand: 2^-3 of a product is 18 dB. Attention is products of
    # products, and its softmax's gradient a difference: no crossed wires, no more.
    limit = 10 if "Attention" in name else 18
    largest = max(float(jnp.linalg.norm(e)) for e in jax.tree.leaves(plain))
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        # The key's bias has no gradient but rounding errors: softmax removes it.
        if jnp.linalg.norm(e) > 1e-3 * largest:
            assert numerics.sqnr_db(a, e) > limit


# Attention's projections are Flax's layers: they hold the product itself.
@pytest.mark.parametrize("name", ["LinearGeneral", "Einsum"])
def test_recipe_can_be_reassigned(name):
    layer = CASES[name].make(getattr(fp8jax.nnx, name))
    layer.recipe = recipes.bf16()
    flax = CASES[name].make(getattr(nnx, name))
    x = activations(name)
    chex.assert_trees_all_equal(layer(x), flax(x))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("LinearGeneral", {"dot_general": twice_dot}),
        ("LinearGeneral", {"dot_general_cls": lambda: twice_dot}),
        ("Einsum", {"einsum_op": twice_einsum}),
        (
            "MultiHeadAttention",
            {"qkv_dot_general": twice_dot, "out_dot_general_cls": lambda: twice_dot},
        ),
    ],
)
@pytest.mark.parametrize("given", [{"recipe": recipes.bf16()}, {"implementation": "x"}])
def test_own_product_together_with_a_recipe_is_refused(name, own, given):
    with pytest.raises(ValueError, match=rf"fp8jax\.nnx\.{name} takes.*got both"):
        CASES[name].make(getattr(fp8jax.nnx, name), **own, **given)


def test_attention_s_other_projections_keep_the_recipe_beside_a_product_of_one_s_own():
    case = CASES["MultiHeadAttention"]
    layer = case.make(fp8jax.nnx.MultiHeadAttention, qkv_dot_general=twice_dot)
    assert layer.query.dot_general is twice_dot
    assert layer.out.dot_general == ops.ByRecipe(ops.dot_general, None, None)
