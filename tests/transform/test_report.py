"""The report says what is in FP8, what is not, and why."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from fp8jax import recipes
from fp8jax.transform import fp8_transform
from fp8jax.transform.plan import _plan

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
    assert scores[-1] == "[1]"
    assert lines[5].startswith("[1] no operand is a parameter (attention")
    assert lines[6].startswith("1 of 3 matrix products in FP8: 44.4% of")
    assert lines[7] == "Rule that matched nothing: 'nothing/.*'"
    assert len({len(line.split("skipped")[0]) for line in (lines[2], lines[4])}) == 1


def test_table_fits_a_hundred_columns_and_loses_no_reason():
    name = "a_module_of_a_long_name_and_of_many_words"
    params = {name: {name: {str(i): normal(i, D, D) for i in range(2)}}}
    params |= {f"{name}_{i}": {name: {"kernel": normal(i, D, D)}} for i in range(2)}

    def deep(params, x):
        for leaf in jax.tree.leaves(params):
            x = jnp.tanh(x @ leaf)
        return x

    rules = [recipes.Rule(rf"{name}_1/.*", None, reason="kept, " + 30 * "for reasons ")]
    report = fp8_transform(deep, rules=rules).report(params, normal(9, 64, D))
    lines = str(report).splitlines()
    table = lines[: 2 + len(report.rows)]
    assert max(map(len, table)) <= 100
    cut = [line.split()[0] for line in table[2:]]
    assert all(path.startswith("a_module") for path in cut)
    assert all(path.endswith("kernel") or path[-1].isdecimal() for path in cut)
    assert sum("..." in path for path in cut) == len(cut)
    (skipped,) = [row for row in report.rows if row.status == "skipped"]
    notes = " ".join(" ".join(lines[len(table) :]).split())
    assert f"[1] {skipped.reason}".strip() in notes


def test_repr_is_the_table_and_notebooks_have_one_of_their_own():
    report = fp8_transform(forward).report(PARAMS, TOKENS)
    assert repr(report) == str(report)
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len(report.rows)
    assert "btd,bsd-&gt;bts" in page
    assert "2 of 3 matrix products" in page


def test_convolutions_have_the_sizes_of_the_product_that_they_are():
    def convolve(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (2, 2), "SAME", dimension_numbers=dims
        )

    w = normal(0, 3, 3, 16, 32)
    (row,) = fp8_transform(convolve).report({"w": w}, normal(1, 2, 8, 8, 16)).rows
    # Four by four places of two images; three by three of 16 channels for each.
    assert (row.m, row.n, row.k) == (2 * 4 * 4, 32, 3 * 3 * 16)
    assert row.flops == 2 * row.m * row.n * row.k


def test_products_by_what_may_be_a_parameter_have_a_total_of_their_own():
    def fn(x, other):
        return jnp.tanh(x @ other["w"]) @ other["w"] @ other["narrow"]

    args = normal(0, 64, D), {"w": normal(1, D, D), "narrow": normal(2, D, 8)}
    report = fp8_transform(fn).report(*args)
    reasons = [row.reason for row in report.rows]
    would = "would be in FP8 if other/w were a parameter: name it in weights="
    assert reasons[:2] == [would, would]
    assert not reasons[2].startswith("would be")  # Narrower than `min_dim`.
    share = sum(row.flops for row in report.rows[:2]) / report.flops
    assert f"2 more ({share:.1%}) would be in FP8 if" in str(report)


def test_small_numbers_are_written_without_exponents():
    params, x = {"w": normal(0, D, 2)}, normal(1, 4, D)

    def step(params, x):
        return jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p["w"]) ** 2))(params)

    text = str(fp8_transform(step).report(params, x))
    assert "e-0" not in text
    assert "<0.001" in text
    # Some float32 [4, 2], by JAX's version.
    (kept,) = re.findall(r"without FP8: (\d+) B\.", text)
    assert int(kept) % (4 * 4 * 2) == 0


def test_products_of_one_column_share_a_line():
    def step(params, x):
        def loss(params):
            h = jnp.tanh(x @ params["up"])
            return jnp.mean(h @ params["value"]) + jnp.mean(h @ params["gain"])

        return jax.grad(loss)(params)

    sides = {"up": (128, 256), "value": (256, 1), "gain": (256,)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(sides.items())}
    report = fp8_transform(step).report(params, normal(3, 64, 128))
    narrow = [row for row in report.rows if row.path != "up"]
    assert {row.role for row in narrow} == {"fprop", "wgrad", "dgrad"}
    tables = str(report), report.to_markdown(), report._repr_html_()
    for table in tables:
        assert table.count("value") == table.count("gain") == 1
        assert f"{len(narrow)} products of one column" in table
    # Bars within a cell end no cell.
    (line,) = [line for line in tables[1].splitlines() if "value" in line]
    assert line.replace("\\|", "").count("|") == 10
    assert len(json.loads(report.to_json())["rows"]) == len(report.rows)
    one = fp8_transform(lambda params, x: x @ params["value"])
    assert "products of one column" not in str(one.report(params, normal(3, 64, 256)))


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


def test_narrow_weights_of_a_step_on_a_gpu_are_noted_with_their_share(monkeypatch):
    monkeypatch.setattr(_plan, "implementation_of", lambda *how: "mosaic_gpu")
    wide, narrow = 4096, 768
    shapes = {"up": (narrow, wide), "q": (narrow, narrow), "mix": (wide, wide)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for name, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((256, narrow), jnp.bfloat16)

    def loss(params, x):
        return jnp.mean(
            jnp.tanh(jnp.tanh(x @ params["q"]) @ params["up"]) @ params["mix"]
        )

    report = fp8_transform(jax.grad(loss)).report(params, x)
    # By hand: k n / (k + n) is 384 of q, 647 of up and 2048 of mix.
    (note,) = [note for note in report.notes if note.startswith("Narrow weights")]
    assert "q [768, 768]. On Hopper" in note
    of_q = sum(row.flops for row in report.rows if row.path == "q")
    assert f"{of_q / report.flops:.1%} of the FLOPs" in note
    # A forward function may be one for inference, whose few rows cost next to nothing.
    assert not fp8_transform(loss).report(params, x).notes
    monkeypatch.setattr(_plan, "implementation_of", lambda *how: "xla")
    assert not fp8_transform(jax.grad(loss)).report(params, x).notes
