"""Flax's ways of rematerializing: every module is a name scope, and nothing is lost."""

import collections

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fp8jax.transform import fp8_transform

D = 128
X = jax.random.normal(jax.random.key(0), (64, D))
LAYERS = 2


class Block(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, _=None):
        h = flax.linen.gelu(flax.linen.Dense(2 * D, name="up")(x))
        return x + jnp.tanh(flax.linen.Dense(D, name="down")(h)), None


class Loop(flax.linen.Module):
    block: type

    @flax.linen.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x, _ = self.block()(x)
        return x


class Scan(flax.linen.Module):
    block: type

    @flax.linen.compact
    def __call__(self, x):
        layers = flax.linen.scan(
            self.block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers()(x, None)[0]


class Whole(flax.linen.Module):
    block: type

    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.remat(Loop)(self.block)(x)


def remat_of_jit(block):
    return flax.linen.remat(flax.linen.jit(block))


BLOCKS = {
    "plain": lambda block: block,
    "remat": flax.linen.remat,
    "remat of jit": remat_of_jit,
    "saved": lambda block: flax.linen.remat(
        block, policy=jax.checkpoint_policies.dots_saveable
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("network", [Loop, Scan, Whole])
def test_linen_module_is_in_fp8_whole_with_all_its_gradients(network, block):
    net = network(BLOCKS[block](Block))
    variables = net.init(jax.random.key(1), X)

    @jax.jit
    def step(variables, x):
        def loss(variables):
            return jnp.mean(jnp.square(net.apply(variables, x)))

        return jax.value_and_grad(loss)(variables)

    report = fp8_transform(step).report(variables, X)
    assert report.fraction == 1.0, str(report)
    roles = collections.Counter(row.role for row in report.rows)
    count = 2 if network is Scan else 2 * LAYERS
    # The first layer of an unrolled network has an input without a gradient.
    assert roles["fprop"] == roles["wgrad"] == count
    assert roles["dgrad"] == count - (network is not Scan)
    assert (roles["recompute"] > 0) == (network is Whole or block.startswith("remat"))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.down(nnx.gelu(self.up(x))))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            with jax.named_scope("jvp(block)"):
                x = nnx.remat(NnxBlock.__call__)(block, x)
        return x


def test_nnx_module_under_remat_is_in_fp8_whole():
    @nnx.jit
    def step(model, x):
        def loss(model):
            with jax.named_scope("transpose(jvp(model))"):
                return jnp.mean(jnp.square(model(x)))

        value, grads = nnx.value_and_grad(loss)(model)
        params = jax.tree.map(lambda p, g: p - g, nnx.state(model, nnx.Param), grads)
        nnx.update(model, params)
        return value

    report = fp8_transform(step).report(NnxNet(nnx.Rngs(0)), X)
    assert report.fraction == 1.0, str(report)
    roles = collections.Counter(row.role for row in report.rows)
    assert roles["fprop"] == roles["wgrad"] == 2 * LAYERS
    assert roles["dgrad"] == 2 * LAYERS - 1
