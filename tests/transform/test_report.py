"""The report says what is in FP8, what is not, and why."""

import json

import jax
import jax.numpy as jnp
import pytest

from fp8jax import recipes
from fp8jax.transform import fp8_transform

D = 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


PARAMS = {
    "embed": normal(2, 32, D),
    "layer": {"up": normal(0, D, 256), "down": normal(1, 256, D)},
}
TOKENS = jnp.zeros((2, 64), jnp.int32)
FORWARD_FLOPS = 2 * 128 * D * 256


def forward(params, tokens):
    x = params["embed"][tokens]
    x = jnp.tanh(jnp.tanh(x @ params["layer"]["up"]) @ params["layer"]["down"])
    return jnp.einsum("btd,bsd->bts", x, x)


def default_skip(path):
    return recipes.first_match(recipes.DEFAULT_SKIPS, path, "fprop", D, D)


def test_text_has_every_row_the_totals_and_unmatched_rules():
    rules = [recipes.Rule("nothing/.*"), recipes.Rule(".*/up", reason="too narrow")]
    text = str(fp8_transform(forward, rules=rules).report(PARAMS, TOKENS))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["path", "role", "m", "n"]
    up, down, scores = (line.split() for line in lines[2:5])
    assert up[:6] == ["layer/up", "fprop", "128", "256", "128", "1"]
    assert "too narrow" in lines[2]
    assert down[7:] == ["fp8", "1x128", "128x128", "xla"]
    assert "attention" in lines[4], scores
    assert lines[5].startswith("1 of 3 matrix products in FP8: 44.4% of")
    assert lines[6] == "Rule that matched nothing: 'nothing/.*'"
    assert len({len(line.split("skipped")[0]) for line in (lines[2], lines[4])}) == 1


def test_fraction_weighs_products_by_flops_and_by_loop_trips():
    report = fp8_transform(forward).report(PARAMS, TOKENS)
    scores = 2 * 2 * 64 * 64 * D
    assert report.flops == 2 * FORWARD_FLOPS + scores
    assert report.fraction == pytest.approx(2 * FORWARD_FLOPS / report.flops)

    def looped(params, tokens):
        return jax.lax.map(lambda t: forward(params, t), jnp.stack([tokens] * 3))

    again = fp8_transform(looped).report(PARAMS, TOKENS)
    assert again.flops == 3 * report.flops
    assert again.fraction == report.fraction


def test_first_matching_rule_wins_and_user_rules_come_before_the_default_skips():
    wide = recipes.deepseek_v3(scale="fp32")
    rules = [
        recipes.Rule(".*/up", None),
        recipes.Rule(".*/(up|down)", wide),
        recipes.Rule("embed", wide),
    ]

    def tied(params, tokens):
        return forward(params, tokens), params["embed"][tokens] @ params["embed"].T

    report = fp8_transform(tied, rules=rules, min_dim=32).report(PARAMS, TOKENS)
    status = {r.path: r.status for r in report.rows if r.role == "fprop"}
    assert status == {"layer/up": "skipped", "layer/down": "fp8", "embed": "fp8"}
    assert report.unmatched_rules == ()


def test_patterns_match_the_whole_path():
    report = fp8_transform(forward, rules=[recipes.Rule("up")]).report(PARAMS, TOKENS)
    assert report.unmatched_rules == ("up",)
    assert [r.status for r in report.rows[:2]] == ["fp8", "fp8"]


def test_rule_that_matches_nothing_is_a_warning_that_names_it():
    fn = fp8_transform(forward, rules=[recipes.Rule("nothing/.*")])
    with pytest.warns(UserWarning, match=r"forward.*'nothing/\.\*' matched no"):
        fn(PARAMS, TOKENS)


def test_function_without_a_product_to_rewrite_is_a_warning():
    with pytest.warns(UserWarning, match="no matrix product to compute in FP8"):
        fp8_transform(lambda x: x @ x)(jnp.ones((D, D)))


@pytest.mark.parametrize(
    "path",
    [
        "params/embedder/input_embedding",
        "tok_emb/kernel",
        "wte",
        "params/lm_head/kernel",
        "head/w",
        "layers/3/moe/router/kernel",
        "layers/ln_1/scale",
        "block_0/RMSNorm_0/scale",
        "layers/attn_norm",
        "params/Embed_0/embedding",
        "params/LayerNorm_0/scale",
    ],
)
def test_default_skips_know_the_usual_names(path):
    assert default_skip(path) is not None


@pytest.mark.parametrize(
    "path",
    [
        "layers/mlp/gate_proj/kernel",
        "layers/gate",
        "params/layers_0/attn/query/kernel",
        "heads/0/kernel",
        "layers/attention/output/kernel",
        "params/Dense_0/kernel",
        "encoder/linear/kernel",
    ],
)
def test_default_skips_leave_dense_layers_alone(path):
    assert default_skip(path) is None


def test_markdown_and_json_hold_the_rows():
    report = fp8_transform(forward).report(PARAMS, TOKENS)
    markdown = report.to_markdown().splitlines()
    assert markdown[0].startswith("| path | role | m |")
    assert markdown[2].startswith("| layer/up | fprop | 128 | 256 | 128 |")
    data = json.loads(report.to_json())
    assert data["fraction"] == report.fraction
    assert [row["role"] for row in data["rows"]] == ["fprop", "fprop", "other"]
