"""The two front doors: a transformed step and a model of FP8 layers are one program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fp8jax
from fp8jax.testing import assert_same_bits

VOCABULARY, WIDTH, INNER = 64, 128, 256


def language_model(linear):
    """A gated residual model whose inner layers are `linear`."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
            options = {"dtype": jnp.bfloat16, "rngs": rngs}
            self.gate = linear(WIDTH, INNER, use_bias=False, **options)
            self.up = linear(WIDTH, INNER, **options)
            self.down = linear(INNER, WIDTH, use_bias=False, **options)

        def __call__(self, x):
            h = self.norm(x).astype(jnp.bfloat16)
            h = jax.nn.silu(self.gate(h)) * self.up(h)
            return x + self.down(h).astype(jnp.float32)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.first, self.second = Block(rngs), Block(rngs)
            self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.second(self.first(self.embed(tokens))))

    return Model(nnx.Rngs(0))


def train_step(model):
    """A jitted AdamW step `(params, opt_state, tokens)`, and where it starts."""
    graph, params = nnx.split(model)
    optimizer = optax.adamw(1e-3)

    def loss_fn(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        labels = tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    @jax.jit
    def step(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, grads

    return step, (params, optimizer.init(params))


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, VOCABULARY, (4, 65)), jnp.int32)


def leaves(tree):
    return jax.tree.leaves(jax.tree.map(np.asarray, tree))


@pytest.mark.parametrize("recipe", ["pow2", "fp32"])
def test_transformed_step_is_the_fp8_layers_step_bit_for_bit(tokens, recipe):
    recipe = fp8jax.recipes.deepseek_v3(recipe)

    def fp8_linear(*args, **kwargs):
        return fp8jax.nnx.Linear(*args, recipe=recipe, **kwargs)

    plain_step, state = train_step(language_model(nnx.Linear))
    layers_step, layers_state = train_step(language_model(fp8_linear))
    fp8_step = fp8jax.fp8_transform(plain_step, recipe)
    assert fp8_step.report(*state, tokens).fraction > 0.8

    before = plain_step(*state, tokens)
    for _ in range(3):
        *state, loss, grads = fp8_step(*state, tokens)
        *layers_state, layers_loss, layers_grads = layers_step(*layers_state, tokens)
        assert_same_bits(leaves((loss, grads)), leaves((layers_loss, layers_grads)))
    assert float(loss) < float(before[2])
    assert not np.array_equal(fp8_step(*before[:2], tokens)[2], before[2])


def test_the_plain_step_is_the_same_before_and_after_a_transform_ran(tokens):
    plain_step, state = train_step(language_model(nnx.Linear))
    before = plain_step(*state, tokens)
    fp8jax.fp8_transform(plain_step)(*state, tokens)
    plain_step.clear_cache()
    assert_same_bits(leaves(plain_step(*state, tokens)), leaves(before))


def test_a_transform_of_the_forward_inside_grad_has_the_layers_gradients(tokens):
    graph, params = nnx.split(language_model(nnx.Linear))
    fp8_graph, fp8_params = nnx.split(language_model(fp8jax.nnx.Linear))
    chex.assert_trees_all_equal_shapes_and_dtypes(leaves(params), leaves(fp8_params))

    def forward(params, tokens):
        return nnx.merge(graph, params)(tokens)

    fp8_forward = fp8jax.fp8_transform(forward)

    def loss(forward):
        return jax.jit(
            jax.value_and_grad(lambda params: (forward(params, tokens) ** 2).mean())
        )

    actual = loss(fp8_forward)(params)
    expected = loss(lambda params, tokens: nnx.merge(fp8_graph, params)(tokens))(
        fp8_params
    )
    assert_same_bits(leaves(actual), leaves(expected))
