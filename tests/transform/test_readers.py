"""Routers, heads and embeddings are told by what reads them, whatever their names."""

import collections

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from fp8jax import recipes
from fp8jax.recipes import Rule
from fp8jax.transform import fp8_transform

TOKENS, D, HIDDEN, WORDS, EXPERTS = 64, 128, 256, 384, 160


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def by_path(fn, *args, **options):
    """What the report says of each weight: "fp8", or why not."""
    found = collections.defaultdict(set)
    for row in fp8_transform(fn, **options).report(*args).rows:
        if row.role != "other":
            for path in row.path.split(" | "):  # Of one of several.
                found[path].add(row.reason if row.status == "skipped" else "fp8")
    assert all(len(said) == 1 for said in found.values()), found
    return {path: said.pop() for path, said in found.items()}


HEAD = "by default: output head: its result goes into a log-sum-exp"
ROUTER = "by default: router: its result is ranked"
TABLE = "by default: embedding: integers pick its rows"

LABELS = jnp.arange(TOKENS) % WORDS
X = normal(9, TOKENS, D)
MLP = {
    "gate": normal(0, D, HIDDEN),
    "up": normal(1, D, HIDDEN),
    "w": normal(2, HIDDEN, D),
}


def mlp(params, x):
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["w"]


def normalized(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def integer_labels(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def soft_labels(logits):
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(LABELS, WORDS)).mean()


def log_softmax(logits):
    wide = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(wide, LABELS[:, None], axis=1).mean()


def by_hand(logits):
    top = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = jnp.log(jnp.exp(logits - top).sum(axis=-1)) + top[:, 0]
    return (total - logits[jnp.arange(TOKENS), LABELS]).mean()


def capped(logits):
    return integer_labels(30 * jnp.tanh(logits / 30))


def with_z_loss_and_accuracy(logits):
    z = jax.nn.logsumexp(logits, axis=-1)
    hits = jnp.argmax(logits, axis=-1) == LABELS
    return log_softmax(logits) + 1e-4 * (z**2).mean() + 0 * hits.mean()


LOSSES = [integer_labels, soft_labels, log_softmax, by_hand, capped]
LOSSES += [with_z_loss_and_accuracy, jax.checkpoint(integer_labels)]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_goes_into_a_cross_entropy_is_a_head(loss):
    def step(params, x):
        def run(params):
            h = x
            for layer in params[:2]:
                h = h + mlp(layer, normalized(h))
            return loss(normalized(h) @ params[2])

        return jax.value_and_grad(run)(params)

    params = [MLP, MLP, normal(3, D, WORDS)]
    found = by_path(step, params, X)
    assert found.pop("2") == HEAD
    assert len(found) == 6
    assert set(found.values()) == {"fp8"}


def test_a_loss_in_chunks_and_layers_in_a_scan():
    def step(params, x):
        def run(params):
            h, _ = lax.scan(
                jax.checkpoint(lambda h, p: (h + mlp(p, normalized(h)), None)),
                x,
                params["layers"],
            )

            @jax.checkpoint
            def chunk(total, rows):
                logits = rows[0] @ params["last"]
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, rows[1]
                )
                return total + losses.sum(), None

            rows = h.reshape(4, -1, D), LABELS.reshape(4, -1)
            return lax.scan(chunk, 0.0, rows)[0]

        return jax.value_and_grad(run)(params)

    layers = jax.tree.map(lambda w: jnp.stack([w] * 3), MLP)
    found = by_path(step, {"layers": layers, "last": normal(3, D, WORDS)}, X)
    assert found.pop("last") == HEAD
    assert found == dict.fromkeys(("layers/gate", "layers/up", "layers/w"), "fp8")


def mixture(params, x, scores):
    """Experts side by side: DeepSeek, Qwen and Mixtral call the router `gate`."""
    weights, chosen = lax.top_k(scores(x @ params["gate"]), 2)
    share = jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]
    y = mlp(params["expert"], x)
    return y * share.sum(axis=(1, 2))[:, None]


def biased(logits):
    return jax.nn.sigmoid(logits.astype(jnp.float32)) + 0.1


def in_groups(logits):
    grouped = jax.nn.softmax(logits).reshape(TOKENS, 8, -1)
    kept = lax.top_k(grouped.max(axis=2), 4)[1]
    mask = jax.nn.one_hot(kept, 8).sum(axis=1)
    return (grouped * mask[:, :, None]).reshape(TOKENS, -1)


@pytest.mark.parametrize("scores", [jax.nn.softmax, biased, in_groups])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_ranked_is_a_router_and_no_gate_of_an_mlp_is(scores, whole):
    params = {"gate": normal(4, D, EXPERTS), "expert": MLP}

    def forward(params, x):
        return mixture(params, normalized(x), scores)

    def step(params, x):
        return jax.value_and_grad(lambda p: jnp.square(forward(p, x)).mean())(params)

    found = by_path(step if whole else forward, params, X)
    assert found.pop("gate") == ROUTER
    assert set(found) == {"expert/gate", "expert/up", "expert/w"}
    assert set(found.values()) == {"fp8"}


def test_rules_of_the_user_come_first():
    def forward(params, x):
        return lax.top_k(x @ params["w"], 2)[0]

    found = by_path(
        forward, {"w": MLP["up"]}, X, rules=[Rule("w", recipes.deepseek_v3())]
    )
    assert found == {"w": "fp8"}


def test_numbers_of_whole_tokens_are_no_scores():
    """Tokens chosen by their norm, and softmax without its logarithm: no heads."""

    def step(params, x):
        def run(params):
            h = x + mlp(params, x)
            kept = lax.top_k(jnp.sum(h * h, axis=-1), 8)[1]
            shares = jax.nn.softmax(h @ params["w"].T)
            return jnp.square(h[kept]).mean() + jnp.square(shares @ params["w"]).mean()

        return jax.value_and_grad(run)(params)

    assert set(by_path(step, MLP, X).values()) == {"fp8"}


def gathered(table, ids):
    return table[ids]


def multiplied(table, ids):
    return jax.nn.one_hot(ids, len(table), dtype=table.dtype) @ table


def multiplied_from_the_right(table, ids):
    rows = ids[:, None] == jnp.arange(len(table))
    return jnp.einsum("vd,tv->td", table, rows.astype(table.dtype))


@pytest.mark.parametrize("picked", [gathered, multiplied, multiplied_from_the_right])
def test_a_table_whose_rows_integers_pick_is_an_embedding_tied_or_not(picked):
    def forward(params, ids):
        h = picked(params["tokens"], ids)
        h = h + mlp(jax.tree.map(lambda w: w[1], params["stack"]), h)
        return jnp.tanh(h @ params["tokens"].T)

    params = {
        "tokens": normal(5, WORDS, D),
        "stack": jax.tree.map(lambda w: jnp.stack([w, w]), MLP),
    }
    found = by_path(forward, params, LABELS)
    assert found.pop("tokens") == TABLE
    assert set(found.values()) == {"fp8"}


def test_experts_that_one_hot_rows_pick_and_masks_of_numbers_are_no_embeddings():
    def forward(params, x):
        chosen = jax.nn.one_hot(LABELS % 2, 2)
        h = jnp.einsum("te,edf,td->tf", chosen, params["experts"], x)
        return (h > 0).astype(h.dtype) @ params["w"]

    params = {"experts": normal(6, 2, D, HIDDEN), "w": MLP["w"]}
    found = by_path(forward, params, X)
    assert found["w"] == "fp8"
    assert "embedding" not in found.get("experts", "")


def test_keys_and_callbacks_in_a_step_are_no_readers():
    def forward(params, x, key):
        h = mlp(params, x)
        jax.debug.callback(lambda _: None, h.mean())
        return h + jax.random.normal(key, h.shape)

    assert set(by_path(forward, MLP, X, jax.random.key(0)).values()) == {"fp8"}


def test_the_scope_of_a_product_names_it_where_the_path_does_not():
    def forward(params, x):
        with jax.named_scope("block"):
            h = mlp(params[0], x)
        with jax.named_scope("lm_head"):
            return jnp.tanh(h @ params[1])

    found = by_path(forward, [MLP, normal(3, D, WORDS)], X)
    assert found.pop("1") == "by default: output head: in the scope lm_head"
    assert set(found.values()) == {"fp8"}


# Parameter names of public models, by what DeepSeek-V3 keeps out of FP8.
NAMES = {
    "output head": [
        "lm_head/kernel",
        "params/logits_dense/kernel",
        "output/weight",
        "params/output/kernel",
        "transformer/output_layer/weight",
        "embed_out/kernel",
        "params/decoder/logits_dense/kernel",
        "head/weight",
        "mlm_head/dense/kernel",
        "unembed/W_U",
    ],
    "embedding": [
        "tok_embeddings/weight",
        "model/embed_tokens/weight",
        "params/token_embedder/embedding",
        "transformer/wte/embedding",
        "gpt_neox/embed_in/weight",
        "transformer/embedding/word_embeddings/weight",
        "emb/weight",
    ],
    "router": ["layers_0/router/kernel", "moe/router_weights/w", "mlp/expert_router/w"],
    None: [
        "model/layers/0/mlp/gate/weight",
        "layers/0/feed_forward/gate_proj/kernel",
        "encoder/layer/0/attention/output/dense/kernel",
        "encoder/layer/0/output/dense/kernel",
        "h/0/mlp/c_fc/kernel",
        "blocks/0/att/output/weight",
        "layers/self_attention/out/kernel",
        "params/heads/kernel",
        "decoder/layers/mlp/wi_0/kernel",
    ],
}


@pytest.mark.parametrize(
    ("reason", "path"),
    [(reason, path) for reason, paths in NAMES.items() for path in paths],
)
def test_names_of_public_models(reason, path):
    rule = recipes.first_match(recipes.DEFAULT_SKIPS, path, "fprop", 4096, 4096)
    assert (rule and rule.reason) == reason
