"""With any optimizer the layers' products are found and its own stay as they are."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fp8jax.transform import fp8_transform

D = 128


pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {
    "a": {"w": normal(0, D, D)},
    "b": {"w": normal(1, D, D), "bias": normal(2, D)},
}
X = normal(9, 64, D)
LAYERS = {
    ("a/w", "fprop"),
    ("b/w", "fprop"),
    ("b/w", "wgrad"),
    ("b/w", "dgrad"),
    ("a/w", "wgrad"),
}


def loss_fn(params, x):
    x = jnp.tanh(x @ params["a"]["w"])
    x = jnp.tanh(x @ params["b"]["w"] + params["b"]["bias"])
    return jnp.mean(jnp.square(x - 1))


def step_with(optimizer):
    @jax.jit
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (loss, grads)

    return step


def by_layer(params):
    return jax.tree_util.tree_map_with_path(lambda keys, _: keys[0].key, params)


OPTIMIZERS = {
    "sgd_momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw_mask": optax.adamw(
        1e-3, mask=functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    ),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "schedule_and_clip": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1e-3, 10)),
    ),
    "muon": optax.contrib.muon(1e-2),
    "two_optimizers": optax.partition(
        {"a": optax.sgd(0.1), "b": optax.adam(1e-3)}, by_layer
    ),
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), every_k_schedule=2),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_are_found_and_the_optimizer_s_own_products_stay(name):
    optimizer = OPTIMIZERS[name]
    fn = fp8_transform(step_with(optimizer))
    report = fn.report(PARAMS, optimizer.init(PARAMS), X)
    fp8 = [(r.path, r.role) for r in report.rows if r.status == "fp8"]
    assert len(fp8) == len(LAYERS)
    assert set(fp8) == LAYERS
    others = [r for r in report.rows if r.status != "fp8"]
    assert {r.reason for r in others} <= {
        "outside differentiation: an optimizer's product, or an evaluation"
    }
    assert bool(others) == (name == "muon")


@pytest.mark.parametrize(
    "name", ["muon", "multi_steps", "apply_if_finite", "inject_hyperparams"]
)
def test_update_is_the_plain_one_of_the_fp8_gradients(name):
    optimizer = OPTIMIZERS[name]
    fn = fp8_transform(step_with(optimizer))
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for _ in range(2):
        new_params, new_state, (_, grads) = fn(params, state, X)
        updates, plain_state = update(grads, state, params)
        plain_params = optax.apply_updates(params, updates)
        # Another program, fused otherwise: float32 roundings differ, FP8 ones do not.
        chex.assert_trees_all_close(new_params, plain_params, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(new_state, plain_state, rtol=1e-5, atol=1e-6)
        params, state = new_params, new_state
    assert not np.array_equal(params["a"]["w"], PARAMS["a"]["w"])


def test_apply_if_finite_drops_a_step_whose_activations_overflow():
    optimizer = OPTIMIZERS["apply_if_finite"]
    fn = fp8_transform(step_with(optimizer))
    params, state, _ = fn(PARAMS, optimizer.init(PARAMS), X.at[3, 5].set(jnp.inf))
    chex.assert_trees_all_equal(params, PARAMS)
    assert int(state.total_notfinite) == 1
