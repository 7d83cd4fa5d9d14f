"""What the forward pass keeps, in bytes, and what is done again under remat."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from benchmarks.activations import kept_bytes_a_token
from fp8jax import checkpoint_policies, ops, recipes
from fp8jax.testing import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_device")

DIMS = (((1,), (0,)), ((), ()))
K, N, HIDDEN = 256, 384, 512


def weight(k, n):
    return jax.ShapeDtypeStruct((k, n), jnp.bfloat16)


def dot(x, w, residual="bf16"):
    return fp8jax.dot_general(x, w, DIMS, recipe=recipes.deepseek_v3(residual=residual))


def test_codes_are_at_most_55_percent_of_the_bytes_of_bf16():
    bf16 = kept_bytes_a_token(dot, K, weight(K, N))
    assert bf16 == 2 * K
    fp8_dot = functools.partial(dot, residual="fp8")
    fp8 = kept_bytes_a_token(fp8_dot, K, weight(K, N))
    # Codes, and a float32 scale for 128 of them.
    assert fp8 == K * (1 + 4 / 128)
    assert fp8 <= 0.55 * bf16


def test_gated_mlp_keeps_its_input_and_what_is_activated_alone():
    weights = weight(K, HIDDEN), weight(K, HIDDEN), weight(HIDDEN, K)
    recipe = recipes.deepseek_v3(residual="fp8")
    assert kept_bytes_a_token(ops.swiglu_mlp, K, *weights) == 2 * (K + 2 * HIDDEN)
    fp8_mlp = functools.partial(ops.swiglu_mlp, recipe=recipe)
    fp8 = kept_bytes_a_token(fp8_mlp, K, *weights)
    assert fp8 == K * (1 + 4 / 128) + 2 * 2 * HIDDEN
    recipe = recipes.deepseek_v3(residual="recompute")
    again = functools.partial(ops.swiglu_mlp, recipe=recipe)
    assert kept_bytes_a_token(again, K, *weights) == 2 * K


@pytest.mark.parametrize("recipe", [recipes.deepseek_v3, recipes.blocked_wgrad])
def test_recomputed_block_has_the_bits_of_one_that_keeps(recipe):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (128, K), (K, HIDDEN), (K, HIDDEN), (HIDDEN, K)
    args = [jax.random.normal(*a) for a in zip(keys, shapes, strict=True)]

    def gradients(residual):
        mlp = functools.partial(ops.swiglu_mlp, recipe=recipe(residual=residual))
        return jax.jit(jax.grad(lambda *a: mlp(*a).sum(), range(4)))(*args)

    assert_same_bits(gradients("recompute"), gradients("bf16"))


def test_recomputing_in_a_single_product_is_keeping_it():
    bf16, again = (
        kept_bytes_a_token(functools.partial(dot, residual=r), K, weight(K, N))
        for r in ("bf16", "recompute")
    )
    assert bf16 == again


def calls(fn, *args):
    """How many of our quantizations and GEMMs are in the program."""
    text = str(jax.make_jaxpr(fn)(*args))
    count = lambda pattern: len(re.findall(rf"name=fp8jax::{pattern}", text))  # noqa: E731
    return count("quantize"), count("gemm")


def two_layers(residual, x, w):
    y = jnp.tanh(dot(x, w, residual))
    return jnp.sin(dot(y, w, residual)).sum()


# What is done again: x and w of two layers are quantized, and multiplied.
POLICIES = {
    None: (0, 0),
    "nothing_saveable": (4, 2),
    "products_saveable": (4, 0),
    "weight_codes_saveable": (2, 2),
    "codes_saveable": (0, 2),
    "products_and_codes_saveable": (0, 0),
}


@pytest.mark.parametrize(("policy", "again"), POLICIES.items())
def test_policy_recomputes_what_it_says(policy, again):
    x = w = jnp.ones((K, K), jnp.bfloat16)
    loss = functools.partial(two_layers, "fp8")
    without = calls(jax.grad(loss, (0, 1)), x, w)
    assert without == (2 * 3, 2 * 3)  # x, w and dout, both ways each
    if policy is not None:
        ours = getattr(checkpoint_policies, policy, None)
        policy = ours or getattr(jax.checkpoint_policies, policy)
        loss = jax.checkpoint(loss, policy=policy)
    found = calls(jax.grad(loss, (0, 1)), x, w)
    assert tuple(f - w for f, w in zip(found, without, strict=True)) == again


def test_gradients_under_a_policy_are_those_without():
    x, w = (jax.random.normal(jax.random.key(i), (K, K)) for i in range(2))

    def loss(x, w):
        return dot(dot(x, w, "fp8"), w, "fp8").sum()

    policy = checkpoint_policies.products_and_codes_saveable
    saved = jax.checkpoint(loss, policy=policy)
    assert_same_bits(*(jax.jit(jax.grad(f, (0, 1)))(x, w) for f in (saved, loss)))


def reachable(text, root):
    """The computations of an HLO module that run within `root`."""
    computations = {}
    for block in text.split("\n\n"):
        head = re.match(r"(?:ENTRY )?(%[\w.\-]+) ", block.strip())
        if head:
            computations[head[1]] = block
    found, todo = {}, [root]
    while todo:
        name = todo.pop()
        if name in computations and name not in found:
            found[name] = computations[name]
            calls = r"(?:calls|to_apply|body|condition)=(%[\w.\-]+)"
            todo += re.findall(calls, computations[name])
    return "\n".join(found.values())


def test_scan_over_microbatches_quantizes_the_weight_before_it():
    k, n = 256, 384

    def loss(x, w):
        y = jnp.sin(dot(x, w, "fp8"))
        return y.astype(jnp.float32).sum()

    @jax.jit
    def step(w, xs):
        def body(total, x):
            dx, dw = jax.grad(loss, (0, 1))(x, w)
            return total + dw.astype(jnp.float32), dx

        return jax.lax.scan(body, jnp.zeros(w.shape), xs)

    xs = jax.ShapeDtypeStruct((4, 128, k), jnp.bfloat16)
    text = step.lower(weight(k, n), xs).compile().as_text()

    def made(text):
        """What is rounded to FP8 there, of the weight (3 and 2 tiles) and of x."""
        shapes = r"2,128,3,128|3,128,2,128|128,1,2,128"
        pattern = rf" = f8e4m3fn\[({shapes})\][^=]* convert\("
        return sorted(re.findall(pattern, text))

    # XLA's form of `quantize_both` makes the codes and their transpose one by one.
    x, w_codes = "128,1,2,128", ["2,128,3,128", "3,128,2,128"]
    assert made(text) == [x, *w_codes]
    # The compiler moves the weight's out of the loop, and leaves the input's in it.
    bodies = [reachable(text, b) for b in re.findall(r"body=(%[\w.\-]+)", text)]
    assert [made(body) for body in bodies if made(body)] == [[x]]
