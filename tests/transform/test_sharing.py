"""Products of one value share its codes: it is quantized once for each use."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from fp8jax import _compat, ops, recipes
from fp8jax.transform import fp8_transform as transform
from fp8jax.transform.ir import jaxprs_of

D, HIDDEN = 128, 256
# Where a chain is computed with its codes, they are not counted one by one.
fp8_transform = functools.partial(transform, without=("fuse",))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


MLP = {
    "gate": normal(0, D, HIDDEN),
    "up": normal(1, D, HIDDEN),
    "down": normal(2, HIDDEN, D),
}
ATTENTION = {name: normal(i, D, D) for i, name in enumerate("qkv")}
X = normal(9, 2, 64, D)


def mlp(params, x):
    h = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
    return x + h @ params["down"]


def step_of(forward, argnums=(0, 1)):
    def loss(params, x):
        return jnp.mean(jnp.square(forward(params, x).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums)


def marked_calls(fn, *args):
    """How often each of our functions is called, by name, but for calls within one."""
    calls = collections.Counter()

    def visit(jaxpr):
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            name = str(eqn.params.get("name", ""))
            if name.startswith(ops.MARK):
                calls[name.removeprefix(ops.MARK)] += 1
            else:
                for sub in jaxprs_of(eqn):
                    visit(sub)

    visit(fn.trace(*args).jaxpr)
    return calls


# Gate and up share x, in fprop and in wgrad; each weight is quantized once, for fprop
# and dgrad. With operands quantized by each of the nine products it would be 18.
INPUTS = 1 + 1  # x and down's input
MLP_CALLS = {
    "quantize": INPUTS + INPUTS,  # For fprop, and for wgrad.
    "quantize_both": 3 + 3,  # The weights; each gradient for dgrad and for wgrad.
    "fprop": 3,
    "dgrad": 3,
    "wgrad": 3,
}


def test_gate_and_up_quantize_their_input_once():
    forward = fp8_transform(jax.jit(step_of(mlp)), weights=0)
    assert marked_calls(forward, MLP, X) == MLP_CALLS


def test_transforming_twice_quantizes_no_more_than_once():
    twice = fp8_transform(fp8_transform(step_of(mlp), weights=0), weights=0)
    # Within another trace nothing tells whether arrays are sharded: no code is shared.
    calls = marked_calls(twice, MLP, X)
    assert calls == {role: MLP_CALLS[role] for role in ("fprop", "dgrad", "wgrad")}


def test_scanned_and_rematted_block_shares_codes_of_its_values():
    def forward(params, x):
        body = jax.checkpoint(lambda x, layer: (mlp(layer, x), None))
        return jax.lax.scan(body, x, params)[0]

    stacked = jax.tree.map(lambda a: jnp.stack([a] * 2), MLP)
    calls = marked_calls(fp8_transform(step_of(forward), weights=0), stacked, X)
    # The weights are quantized before both loops. The backward one recomputes gate and
    # up, whose input is quantized for that and for wgrad at once.
    assert calls == {
        "quantize": INPUTS + 1,
        "quantize_both": 3 + 3 + 1,
        "fprop": 3,
        "recompute": 2,
        "dgrad": 3,
        "wgrad": 3,
    }


def test_layers_that_each_cast_the_same_input_share_its_codes():
    def forward(params, x):
        q, k, v = (
            x.astype(jnp.bfloat16) @ params[name].astype(jnp.bfloat16) for name in "qkv"
        )
        return q * k * v

    calls = marked_calls(fp8_transform(step_of(forward, 0)), ATTENTION, X)
    assert calls == {"quantize": (1 + 3) + (1 + 3), "fprop": 3, "wgrad": 3}


def test_products_of_different_recipes_share_no_codes():
    step = step_of(mlp)
    rules = [recipes.Rule("up", recipes.deepseek_v3(scale="fp32"))]
    mixed = fp8_transform(step, rules=rules, weights=0)
    # Up has codes of x of its own, for fprop and for wgrad.
    assert marked_calls(mixed, MLP, X)["quantize"] == MLP_CALLS["quantize"] + 2


def accumulated(forward):
    """Gradients added up over microbatches by a scan that closes over the weights."""

    def step(params, x):
        def add(total, batch):
            _, grads = step_of(forward, 0)(params, batch)
            return jax.tree.map(jnp.add, total, grads), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, x)[0]

    return step


def in_bf16(params, x):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    return mlp(params, x.astype(jnp.bfloat16)).astype(jnp.float32)


def names_in(jaxpr, inside=False):
    """Names of our functions, and whether a scan's body calls them."""
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        name = str(eqn.params.get("name", ""))
        if name.startswith(ops.MARK):
            yield name.removeprefix(ops.MARK), inside
        else:
            for sub in jaxprs_of(eqn):
                yield from names_in(sub, inside or eqn.primitive.name == "scan")


@pytest.mark.parametrize("forward", [mlp, in_bf16], ids=["float32", "cast"])
def test_weights_are_quantized_once_before_a_scan_over_microbatches(forward):
    step = jax.jit(accumulated(forward))
    batches = jnp.stack([X, 2 * X, X / 3])
    fn = fp8_transform(step, weights=0)
    found = collections.Counter(names_in(fn.trace(MLP, batches).jaxpr))
    # Down's for fprop and dgrad; x needs no gradient, and so the others no dgrad.
    assert (found["quantize", False], found["quantize_both", False]) == (2, 1)
    # x and down's input, each for fprop and for wgrad; two gradients for wgrad alone.
    assert (found["quantize", True], found["quantize_both", True]) == (2 * 2 + 2, 1)
    assert ("fprop", False) not in found
    total = fn(MLP, batches)
    one = fp8_transform(step_of(forward, 0))
    wanted = jax.tree.map(lambda *g: sum(g), *(one(MLP, x)[1] for x in batches))
    # The scan begins with zero and adds in order, too; XLA may fuse a rounding away.
    chex.assert_trees_all_close(total, wanted, rtol=2.0**-7, atol=1e-6)


def test_weights_leave_nested_loops_and_statistics_stay_with_their_products():
    def step(params, x):
        def outer(total, batches):
            return total + accumulated(mlp)(params, batches)["up"], None

        return jax.lax.scan(outer, jnp.zeros_like(params["up"]), x)[0]

    batches = jnp.stack([X, X])[None]
    fn = fp8_transform(step, weights=0, stats=True)
    found = collections.Counter(names_in(fn.trace(MLP, batches).jaxpr))
    assert found["quantize", False] + found["quantize_both", False] == 3
    total, stats = fn(MLP, batches)
    chex.assert_trees_all_equal(total, fp8_transform(step, weights=0)(MLP, batches))
    assert stats["up"]["fprop"]["sqnr_db"].shape == (1, 2, 2)


def test_einsums_share_codes_though_each_is_a_jitted_function():
    def forward(params, x):
        gate, up = (jnp.einsum("btd,df->btf", x, params[n]) for n in ("gate", "up"))
        h = jax.nn.silu(gate) * up
        return x + jnp.einsum("btf,fd->btd", h, params["down"])

    fn = fp8_transform(step_of(forward), weights=0)
    assert marked_calls(fn, MLP, X) == MLP_CALLS
    plain = fp8_transform(step_of(mlp), weights=0)
    chex.assert_trees_all_equal(fn(MLP, X), plain(MLP, X))


def test_jitted_layers_keep_their_names_in_the_program():
    @jax.jit
    def layer(x, w):
        with jax.named_scope("inner"):
            return x @ w

    def forward(params, x):
        with jax.named_scope("outer"):
            return layer(layer(x, params["q"]), params["k"])

    fn = fp8_transform(step_of(forward, 0))
    assert {row.status for row in fn.report(ATTENTION, X).rows} == {"fp8"}
    stacks = [
        str(eqn.source_info.name_stack)
        for eqn in _compat.open_jaxpr(fn.trace(ATTENTION, X).jaxpr).eqns
        if str(eqn.params.get("name", "")) in ("fp8jax::fprop", "fp8jax::wgrad")
    ]
    assert len(stacks) == 4
    assert all("outer" in stack and "inner" in stack for stack in stacks)


def test_fp8_residuals_are_made_together_with_the_forward_pass_s_codes():
    step = step_of(mlp)
    kept = fp8_transform(step, weights=0)
    codes = fp8_transform(step, recipes.deepseek_v3(residual="fp8"), weights=0)
    assert marked_calls(codes, MLP, X) == {
        "quantize_both": 3 + 2 + 3,  # The weights; x and down's input; the gradients.
        **dict.fromkeys(("fprop", "dgrad", "wgrad"), 3),
    }
    chex.assert_trees_all_equal(codes(MLP, X), kept(MLP, X))
    inside = fp8_transform(mlp, recipes.deepseek_v3(residual="fp8"))
    chex.assert_trees_all_equal(codes(MLP, X), jax.jit(step_of(inside))(MLP, X))


@pytest.mark.parametrize("of", ["x", "w"])
def test_slices_of_one_array_are_not_taken_for_one_another(of):
    def forward(params, x):
        w = params["w"]
        first, second = (x[:, :32], x[:, 32:]) if of == "x" else (x, x)
        v, u = (w, w) if of == "x" else (w[0], w[1])
        return jnp.tanh(first @ v) * jnp.tanh(second @ u)

    params = {"w": normal(3, D, D) if of == "x" else normal(3, 2, D, D)}
    whole = fp8_transform(step_of(forward, 0))
    inside = jax.jit(step_of(fp8_transform(forward), 0))
    chex.assert_trees_all_equal(whole(params, X), inside(params, X))


def test_codes_are_made_under_the_name_stack_of_their_first_product():
    def forward(params, x):
        with jax.named_scope("first"):
            gate = x @ params["gate"]
        with jax.named_scope("second"):
            up = x @ params["up"]
        return gate * up

    jaxpr = fp8_transform(step_of(forward, 0)).trace(MLP, X).jaxpr
    stacks = [
        str(eqn.source_info.name_stack)
        for eqn in _compat.open_jaxpr(jaxpr).eqns
        if eqn.params.get("name") in ("fp8jax::quantize", "fp8jax::fprop")
        and "transpose" not in str(eqn.source_info.name_stack)
    ]
    assert ["first" in s for s in stacks] == [True] * 3 + [False] * 2
    assert ["second" in s for s in stacks] == [False] * 3 + [True] * 2
