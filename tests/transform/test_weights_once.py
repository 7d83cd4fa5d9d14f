"""A weight is quantized once a step, both ways in one call, whatever is around it."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _compat, ops, recipes
from fp8jax.transform import fp8_transform
from fp8jax.transform.ir import jaxprs_of

D, HIDDEN, LAYERS = 128, 256, 2
WEIGHTS = 2


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


STACKED = {"up": normal(0, LAYERS, D, HIDDEN), "down": normal(1, LAYERS, HIDDEN, D)}
X = normal(9, 64, D)


def block(layer, x):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def cast_block(layer, x):
    """With master weights in float32 and products in bfloat16."""
    layer = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layer)
    return x + block(layer, x.astype(jnp.bfloat16)).astype(x.dtype)


def transposed_block(layer, x):
    """Weights stored the other way around, and one of three dimensions."""
    up = layer["up"].T.reshape(2, HIDDEN // 2, D)
    h = jnp.tanh(jnp.einsum("td,ghd->tgh", x, up))
    return x + jnp.einsum("tgh,ghd->td", h, layer["down"].reshape(2, -1, D))


def scanned(block, remat=False):
    def forward(params, x):
        def body(x, layer):
            return block(layer, x), None

        body = jax.checkpoint(body) if remat else body
        return jax.lax.scan(body, x, params)[0]

    return forward


def unrolled(block):
    def forward(params, x):
        for i in range(LAYERS):
            x = block(jax.tree.map(lambda w, i=i: w[i], params), x)
        return x

    return forward


def step_of(forward):
    return jax.value_and_grad(
        lambda params, x: jnp.mean(jnp.square(forward(params, x))), (0, 1)
    )


def quantizations(fn, *args):
    """Shapes of what our functions quantize, by name and depth of the loops around."""
    found = collections.Counter()

    def visit(jaxpr, depth):
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            name = str(eqn.params.get("name", ""))
            if name.startswith(f"{ops.MARK}quantize"):
                shape = eqn.invars[0].aval.shape
                found[name.removeprefix(ops.MARK), shape, depth] += 1
            elif not name.startswith(ops.MARK):
                for sub in jaxprs_of(eqn):
                    visit(sub, depth + (eqn.primitive.name in ("scan", "while")))

    visit(fn.trace(*args).jaxpr, 0)
    return found


def of_weights(found):
    """Those of what is as large as a weight, or as a stack of them."""
    sizes = {w.size for w in jax.tree.leaves(STACKED)}
    sizes |= {size // LAYERS for size in sizes}
    return {key: n for key, n in found.items() if np.prod(key[1]) in sizes}


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("block", [block, cast_block, transposed_block])
def test_stacked_weights_are_quantized_once_before_both_scans(block, remat):
    fn = fp8_transform(step_of(scanned(block, remat)), weights=0)
    found = of_weights(quantizations(fn, STACKED, X))
    assert sum(found.values()) == WEIGHTS
    # A cast before it is computed in the same call.
    call = "quantize_map" if block is cast_block else "quantize_both"
    assert {(name, depth) for name, _, depth in found} == {(call, 0)}


@pytest.mark.parametrize(
    ("block", "remat"), [(cast_block, False), (transposed_block, True)]
)
def test_codes_of_a_stack_are_those_of_each_of_its_matrices(block, remat):
    stacked = fp8_transform(step_of(scanned(block, remat)), weights=0)
    apart = fp8_transform(step_of(unrolled(block)), weights=0)
    got, wanted = stacked(STACKED, X), apart(STACKED, X)
    # Loops and their absence leave other fusions: an ulp of an input may move a code.
    for one, other in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert jnp.linalg.norm(one - other) <= 2.0**-7 * jnp.linalg.norm(other)


def test_hoisted_codes_have_the_bits_of_those_made_in_the_loop():
    forward = scanned(block, remat=True)
    whole = fp8_transform(step_of(forward), weights=0)(STACKED, X)
    inside = scanned(fp8_transform(block), remat=True)
    chex.assert_trees_all_equal(whole, jax.jit(step_of(inside))(STACKED, X))


def scans(jaxpr):
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        if str(eqn.params.get("name", "")).startswith(ops.MARK):
            continue
        if eqn.primitive.name == "scan":
            yield eqn
        for sub in jaxprs_of(eqn):
            yield from scans(sub)


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("block", [block, cast_block])
def test_scans_read_codes_in_the_place_of_the_weights_and_their_casts(block, remat):
    fn = fp8_transform(step_of(scanned(block, remat)), weights=0)
    shapes = {w.shape for w in STACKED.values()}
    forward, backward = scans(fn.trace(STACKED, X).jaxpr)
    for eqn, gives in ((forward, []), (backward, [jnp.float32] * WEIGHTS)):
        read = [v.aval for v in eqn.invars if v.aval.shape in shapes]
        assert {aval.dtype for aval in read} == {jnp.dtype(jnp.float8_e4m3fn)}
        made = [v.aval.dtype for v in eqn.outvars if v.aval.shape in shapes]
        assert made == gives  # The gradients; no stacked casts.


def test_codes_of_both_ways_take_no_more_bytes_than_the_weight_in_bfloat16():
    fn = fp8_transform(step_of(scanned(cast_block)), weights=0)
    forward, backward = scans(fn.trace(STACKED, X).jaxpr)
    codes = {
        v: v.aval.size
        for eqn in (forward, backward)
        for v in eqn.invars
        if v.aval.dtype == jnp.float8_e4m3fn
    }
    assert sum(codes.values()) == 2 * sum(w.size for w in STACKED.values())


def test_slices_of_activations_are_quantized_in_their_loop():
    def forward(params, x):  # x [LAYERS, ...] is a stack that is no weight.
        def body(carry, x):
            return carry + jnp.tanh(x @ params["up"][0]) @ params["down"][0], None

        return jax.lax.scan(body, jnp.zeros_like(x[0]), x)[0]

    x = jnp.stack([X] * LAYERS)
    found = quantizations(fp8_transform(step_of(forward), weights=0), STACKED, x)
    assert {depth for (_, shape, depth) in found if shape == X.shape} == {1}
    assert not [shape for (_, shape, _) in found if shape == x.shape]
    assert sum(of_weights(found).values()) == WEIGHTS


def test_weights_leave_a_scan_over_microbatches_around_a_scan_over_layers():
    one = step_of(scanned(block, remat=True))

    def step(params, batches):
        def add(total, x):
            return jax.tree.map(jnp.add, total, one(params, x)[1][0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, batches)[0]

    batches = jnp.stack([X, 2 * X])
    fn = fp8_transform(step, weights=0)
    found = of_weights(quantizations(fn, STACKED, batches))
    assert {(name, depth) for name, _, depth in found} == {("quantize_both", 0)}
    assert sum(found.values()) == WEIGHTS
    alone = fp8_transform(one, weights=0)
    wanted = jax.tree.map(jnp.add, *(alone(STACKED, x)[1][0] for x in batches))
    # As above: other fusions, and codes that move.
    chex.assert_trees_all_close(fn(STACKED, batches), wanted, rtol=2.0**-7, atol=1e-7)


def test_weights_leave_scans_in_scans_one_after_the_other():
    grouped = jax.tree.map(lambda w: jnp.stack([w, w / 2, w + 1e-2]), STACKED)

    def grouped_layers(block):
        return lambda groups, x: jax.lax.scan(
            lambda x, layers: (scanned(block, remat=True)(layers, x), None), x, groups
        )[0]

    fn = fp8_transform(step_of(grouped_layers(block)), weights=0)
    found = quantizations(fn, grouped, X)
    shapes = {w.shape for w in jax.tree.leaves(grouped)}
    of_stacks = [key for key in found if key[1] in shapes]
    assert len(of_stacks) == WEIGHTS
    assert {(name, depth) for name, _, depth in of_stacks} == {("quantize_both", 0)}
    assert not of_weights(found)
    for eqn in scans(fn.trace(grouped, X).jaxpr):
        assert len(set(eqn.invars)) == len(eqn.invars), "codes are sliced once"
    inside = jax.jit(step_of(grouped_layers(fp8_transform(block))))
    chex.assert_trees_all_equal(fn(grouped, X), inside(grouped, X))


def test_remat_that_tells_its_operands_apart_is_given_codes_of_its_own():
    def forward(params, x):
        body = jax.checkpoint(
            lambda x, w: (block(w, x), None), prevent_cse=(True, False)
        )
        return jax.lax.scan(body, x, params)[0]

    fn = fp8_transform(step_of(forward), weights=0)
    found = of_weights(quantizations(fn, STACKED, X))
    assert {(name, depth) for name, _, depth in found} == {("quantize_both", 0)}
    (remat,) = (e for s in scans(fn.trace(STACKED, X).jaxpr) for e in remats(s))
    assert len(remat.params["prevent_cse"]) == len(remat.invars)


def remats(scan):
    eqns = _compat.open_jaxpr(scan.params["jaxpr"]).eqns
    return [eqn for eqn in eqns if "prevent_cse" in eqn.params]


def test_weights_of_two_scans_are_quantized_once():
    run = scanned(block)
    fn = fp8_transform(step_of(lambda params, x: run(params, run(params, x))))
    assert sum(of_weights(quantizations(fn, STACKED, X)).values()) == WEIGHTS


def test_weights_of_a_branch_are_quantized_where_it_is_taken():
    def forward(params, x):
        def body(x, layer):
            return jax.lax.cond(x[0, 0] > 0, lambda x: block(layer, x), jnp.sin, x), ()

        return jax.lax.scan(body, x, params)[0]

    fn = fp8_transform(step_of(forward), weights=0)
    found = of_weights(quantizations(fn, STACKED, X))
    assert {depth for _, _, depth in found} == {1}
    # In the forward branch, and in the backward one.
    assert sum(found.values()) == 2 * WEIGHTS


def test_weights_leave_loops_of_unknown_length():
    def step(params, x, steps):
        one = step_of(unrolled(block))

        def more(state):
            i, x = state
            return i + 1, x - one(params, x)[1][1]

        return jax.lax.while_loop(lambda s: s[0] < steps, more, (0, x))[1]

    fn = fp8_transform(step, weights=0)
    found = of_weights(quantizations(fn, STACKED, X, 2))
    assert {depth for _, _, depth in found} == {0}
    assert sum(found.values()) == WEIGHTS * LAYERS
    chex.assert_tree_all_finite(fn(STACKED, X, 2))


def test_weights_of_a_rematted_block_are_quantized_outside_of_it():
    forward = unrolled(jax.checkpoint(block))
    fn = fp8_transform(step_of(forward), weights=0)
    found = of_weights(quantizations(fn, STACKED, X))
    assert {name for name, _, _ in found} == {"quantize_both"}
    assert sum(found.values()) == WEIGHTS * LAYERS
    chex.assert_trees_all_equal(
        fn(STACKED, X),
        jax.jit(step_of(unrolled(jax.checkpoint(fp8_transform(block)))))(STACKED, X),
    )


def test_steps_in_a_scan_quantize_each_step_s_weights_once():
    one = step_of(scanned(block))

    def train(params, batches):
        def body(params, x):
            value, (grads, _) = one(params, x)
            return jax.tree.map(lambda p, g: p - g, params, grads), value

        return jax.lax.scan(body, params, batches)

    fn = fp8_transform(train, weights=0)
    found = of_weights(quantizations(fn, STACKED, jnp.stack([X, X])))
    assert {(name, depth) for name, _, depth in found} == {("quantize_both", 1)}
    assert sum(found.values()) == WEIGHTS


def test_weights_in_a_shard_map_leave_its_scan():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local(params, x):
        grads = step_of(scanned(block, remat=True))(params, x)[1][0]
        return jax.lax.pmean(grads, "data")

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    fn = fp8_transform(step, weights=0)
    found = of_weights(quantizations(fn, STACKED, X))
    assert {(name, depth) for name, _, depth in found} == {("quantize_both", 0)}
    chex.assert_tree_all_finite(fn(STACKED, X))


def test_statistics_of_scanned_layers_are_those_of_codes_made_before_the_scan():
    fn = fp8_transform(step_of(scanned(block)), stats=True, weights=0)
    outputs, stats = fn(STACKED, X)
    plain = fp8_transform(step_of(scanned(block)), weights=0)
    chex.assert_trees_all_equal(outputs, plain(STACKED, X))
    found = of_weights(quantizations(fn, STACKED, X))
    assert {depth for _, _, depth in found} == {0}
    wanted = jnp.abs(STACKED["up"]).max((1, 2))
    for role in ("fprop", "dgrad"):
        chex.assert_trees_all_equal(stats["up"][role]["amax"][:, 1], wanted)


def test_blocks_one_way_and_tiles_the_other_are_made_in_one_call():
    recipe = recipes.deepseek_v3(residual="fp8")
    wgrad = recipes.GemmSpec(fp8jax.BLOCK_128X128, fp8jax.TILE_1X128)
    blocked = recipes.Recipe(recipe.fprop, recipe.dgrad, wgrad, residual="fp8")
    fn = fp8_transform(step_of(block), blocked, weights=0)
    layer = jax.tree.map(lambda w: w[0], STACKED)
    # Two weights, two inputs in rows and in blocks, two gradients: each in one call.
    found = quantizations(fn, layer, X)
    assert sum(found.values()) == 6
    assert {name for name, _, _ in found} == {"quantize_both"}
    inside = jax.jit(step_of(fp8_transform(block, blocked)))
    chex.assert_trees_all_equal(fn(layer, X), inside(layer, X))


def test_codes_that_the_backward_pass_alone_reads_are_not_kept_for_it():
    fn = fp8_transform(step_of(block), weights=0)
    layer = jax.tree.map(lambda w: w[0], STACKED)
    # residual="bf16": x is quantized along tokens where wgrad needs it.
    found = quantizations(fn, layer, X)
    assert found["quantize", X.shape, 0] == 2
    assert found["quantize_both", X.shape, 0] == 1  # The gradient of the output.
