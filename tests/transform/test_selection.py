"""Rules choose by path, by role and by size; the first one wins."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import recipes
from fp8jax.recipes import Rule
from fp8jax.transform import fp8_transform

D, HIDDEN = 128, 256
FP32 = recipes.deepseek_v3(scale="fp32")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {
    "square": normal(0, D, D),
    "up": normal(1, D, HIDDEN),
    "down": normal(2, HIDDEN, D),
    "narrow": normal(3, D, 64),
}
X = normal(9, 64, D)


def forward(params, x):
    for name in ("square", "up", "down", "narrow"):
        x = jnp.tanh(x @ params[name])
    return x


def step(params, x):
    return jax.value_and_grad(lambda p: jnp.mean(jnp.square(forward(p, x))))(params)


def in_fp8(*rules, **options):
    """Roles in FP8 by path, in a whole step."""
    report = fp8_transform(step, rules=rules, **options).report(PARAMS, X)
    assert report.unmatched_rules == ()
    found = collections.defaultdict(set)
    for row in report.rows:
        if row.status == "fp8":
            found[row.path].add(row.role)
    return dict(found)


ALL = {"fprop", "dgrad", "wgrad"}
BY_DEFAULT = {"square": {"fprop", "wgrad"}, "up": ALL, "down": ALL}


def test_rule_for_one_role_leaves_the_others_to_the_rules_after_it():
    rules = Rule(".*", roles=("wgrad",)), Rule("up", roles=("dgrad",))
    assert in_fp8(*rules) == {
        "square": {"fprop"},
        "up": {"fprop"},
        "down": {"fprop", "dgrad"},
    }


def test_rule_by_size_sees_input_and_output_features_in_every_role():
    assert in_fp8() == BY_DEFAULT
    wide = Rule(".*", where=lambda k, n: k < n)
    assert in_fp8(wide) == {k: v for k, v in BY_DEFAULT.items() if k != "up"}
    tall = Rule(".*", where=lambda k, n: k > n)
    assert in_fp8(tall) == {k: v for k, v in BY_DEFAULT.items() if k != "down"}
    small = Rule(".*", where=lambda k, n: k * n < D * HIDDEN)
    assert in_fp8(small) == {k: v for k, v in BY_DEFAULT.items() if k != "square"}


def test_user_rule_beats_the_default_ones_of_size_and_name():
    assert in_fp8(Rule("narrow", FP32)) == {**BY_DEFAULT, "narrow": ALL}
    assert in_fp8(min_dim=64) == {**BY_DEFAULT, "narrow": ALL}
    assert in_fp8(min_dim=D + 1) == {}


def test_reason_names_the_rule_and_whose_it_is():
    rules = [Rule("up", reason="noisy", roles=["wgrad"])]
    rows = fp8_transform(step, rules=rules).report(PARAMS, X).rows
    reasons = {(r.path, r.role): r.reason for r in rows if r.status == "skipped"}
    assert reasons["up", "wgrad"] == "rule: noisy"
    narrow = "by default: a weight of fewer features than min_dim=128"
    assert {reasons["narrow", role] for role in ALL} == {narrow}


@pytest.mark.parametrize("off", [{}, {"recipe": None}, {"recipe": recipes.bf16()}])
def test_rule_without_a_recipe_is_one_with_nothing_in_fp8(off):
    rows = fp8_transform(step, rules=[Rule("up", **off)]).report(PARAMS, X).rows
    reasons = {r.reason for r in rows if r.path == "up" and r.status == "skipped"}
    assert reasons == {"rule: up"}


def test_recipe_none_is_the_default_recipe():
    default = fp8_transform(step, recipes.deepseek_v3()).report(PARAMS, X)
    assert fp8_transform(step, None).report(PARAMS, X) == default
    assert fp8_transform(recipe=None)(step).report(PARAMS, X) == default


def test_rule_of_a_size_or_role_that_never_occurs_is_said_to_match_nothing():
    rules = [
        Rule("up", where=lambda k, n: k == n),
        Rule("square", roles=("dgrad",)),  # Its input has no gradient.
        Rule("down", roles=("dgrad",)),
    ]
    report = fp8_transform(step, rules=rules).report(PARAMS, X)
    assert report.unmatched_rules == ("up", "square")
    # A forward is differentiated outside, so a rule for a gradient is about it, too.
    report = fp8_transform(forward, rules=rules).report(PARAMS, X)
    assert report.unmatched_rules == ("up",)


def test_roles_of_different_rules_have_the_same_bits_in_both_placements():
    rules = [
        Rule("up", roles=("wgrad",)),
        Rule("up", FP32, roles=("dgrad",)),
        Rule("down", roles=("fprop",)),
    ]
    whole = fp8_transform(step, rules=rules)(PARAMS, X)
    fp8_forward = fp8_transform(forward, rules=rules)

    @jax.jit
    def inside(params, x):
        def loss(params):
            return jnp.mean(jnp.square(fp8_forward(params, x)))

        return jax.value_and_grad(loss)(params)

    chex.assert_trees_all_equal(inside(PARAMS, X), whole)
    default = fp8_transform(step)(PARAMS, X)
    assert not np.array_equal(whole[1]["up"], default[1]["up"])
    rows = {r.path: r for r in fp8_forward.report(PARAMS, X).rows}
    assert rows["up"].status == "fp8"
    assert rows["down"].reason == "rule: down; its gradients are in FP8"


def test_fp8_residual_is_given_up_where_a_rule_takes_a_gemm_out():
    recipe = recipes.deepseek_v3(residual="fp8")
    rules = [Rule("up", roles=("wgrad",))]
    fn = fp8_transform(forward, recipe, rules=rules)
    grads = jax.grad(lambda p: jnp.mean(jnp.square(fn(p, X))))(PARAMS)
    chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("role", sorted(ALL))
def test_every_role_alone(role):
    others = tuple(ALL - {role})
    wanted = {k: v & {role} for k, v in BY_DEFAULT.items() if v & {role}}
    assert in_fp8(Rule(".*", roles=others)) == wanted
