"""Trains a scaled-down DeepSeek-V3 twice, in BF16 and in FP8, and compares.

Multi-head latent attention, a mixture of experts with a shared one, and a head that
predicts one byte further (multi-token prediction), in Flax NNX. The text is that of
train_lm.py. Both arms start from the same weights and see the same batches. The second
arm is the first one's jitted train step wrapped by `fp8jax.fp8_transform`.

    python examples/train_moe.py                  # some minutes on two CPU cores
    python examples/train_moe.py --preset h200    # 0.5 G parameters on one H200

It writes loss.csv, loss.png, summary.csv, load.csv and load.png into --out. On a CPU,
FP8 is emulated in float32: only the losses and the experts' load are worth comparing
there. Routing is discrete, so two runs part ways sooner than those of a dense model:
with half the batch and twice the learning rate, other rounding of the initial weights
alone, without FP8, moved the loss by 0.7 % after 120 steps.
"""

import csv
import dataclasses
import functools
import math
import pathlib

import byte_lm
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from rich.console import Console

import fp8jax
import fp8jax.nnx

PROGRAM = "train_moe"
MTP_WEIGHT = 0.3  # Of the loss of the byte after the next.
OFF = fp8jax.recipes.bf16()


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of the run; every flag of the same name overrides one."""

    d_model: int
    layers: int  # The first one has no experts.
    heads: int
    q_rank: int  # Width of the compressed queries,
    kv_rank: int  # and of the compressed keys and values.
    head_dim: int  # Without the rotated part; that of the values, too.
    rope_dim: int
    d_ff: int  # Inner width of the first layer's MLP,
    d_expert: int  # and of one expert's.
    experts: int
    top_k: int
    groups: int
    top_groups: int
    shared: int
    seq_len: int
    batch: int  # Sequences a step.
    steps: int
    learning_rate: float
    balance_rate: float  # How far a routing bias moves a step.


# NOTE: what a product contracts or gives is a multiple of 128, the side of a tile.
# In the BF16 arm XLA holds each row once for every expert, masked, from the forward to
# the backward pass: that, not the weights, is what bounds experts, top_k and batch.
PRESETS = {
    "cpu": Config(
        d_model=128,
        layers=2,
        heads=2,
        q_rank=128,
        kv_rank=128,
        head_dim=64,
        rope_dim=32,
        d_ff=384,
        d_expert=128,
        experts=8,
        top_k=2,
        groups=4,
        top_groups=2,
        shared=1,
        seq_len=64,
        batch=16,
        steps=300,
        learning_rate=1e-3,
        balance_rate=1e-2,
    ),
    "h200": Config(
        d_model=1024,
        layers=8,
        heads=8,
        q_rank=512,
        kv_rank=256,
        head_dim=128,
        rope_dim=64,
        d_ff=2816,
        d_expert=1024,
        experts=16,
        top_k=2,
        groups=4,
        top_groups=2,
        shared=1,
        seq_len=1024,
        batch=8,
        steps=800,
        learning_rate=6e-4,
        balance_rate=1e-2,
    ),
}

byte_lm.define_flags(Config, PRESETS, "runs/train_moe")
FLAGS = flags.FLAGS
parse_flags = functools.partial(byte_lm.parse_flags, PROGRAM)


# The model. Its recipe is BF16 throughout: nothing in it knows of FP8.


def linear(k: int, n: int, c: Config, rngs: nnx.Rngs, back: bool = False) -> nnx.Linear:
    """A map without bias; `back` if it ends in the residual stream: a smaller one."""
    sigma = byte_lm.INIT_SIGMA / (math.sqrt(2 * c.layers) if back else 1)
    init = nnx.initializers.normal(sigma)
    return nnx.Linear(
        k, n, use_bias=False, dtype=jnp.bfloat16, kernel_init=init, rngs=rngs
    )


def norm(features: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(features, dtype=jnp.bfloat16, rngs=rngs)


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.c = c
        keys = c.head_dim + c.rope_dim
        self.q_a = linear(c.d_model, c.q_rank, c, rngs)
        self.q_norm = norm(c.q_rank, rngs)
        self.q_b = linear(c.q_rank, c.heads * keys, c, rngs)
        self.kv_a = linear(c.d_model, c.kv_rank + c.rope_dim, c, rngs)
        self.kv_norm = norm(c.kv_rank, rngs)
        self.kv_b = linear(c.kv_rank, c.heads * 2 * c.head_dim, c, rngs)
        self.out = linear(c.heads * c.head_dim, c.d_model, c, rngs, back=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        c, (batch, time, _) = self.c, x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).reshape(batch, time, c.heads, -1)
        q, q_rope = jnp.split(q, [c.head_dim], axis=-1)
        kv, k_rope = jnp.split(self.kv_a(x), [c.kv_rank], axis=-1)
        kv = self.kv_b(self.kv_norm(kv)).reshape(batch, time, c.heads, -1)
        k, v = jnp.split(kv, 2, axis=-1)
        # The rotated part of the keys is the same for all heads.
        k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
        q = jnp.concatenate([q, byte_lm.rotate(q_rope)], axis=-1)
        k = jnp.concatenate([k, byte_lm.rotate(k_rope)], axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(
            jnp.tri(time, dtype=bool), scores / math.sqrt(q.shape[-1]), -jnp.inf
        )
        share = jax.nn.softmax(scores).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", share, v)
        return self.out(y.reshape(batch, time, -1))


class DenseMLP(nnx.Module):
    """SwiGLU, [..., d_model] to the same."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.gate, self.up = (linear(c.d_model, c.d_ff, c, rngs) for _ in range(2))
        self.down = linear(c.d_ff, c.d_model, c, rngs, back=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def mixture(c: Config, rngs: nnx.Rngs) -> fp8jax.nnx.MoE:
    """DeepSeek-V3's mixture of experts, [..., d_model] to the same."""
    init = nnx.initializers.normal(byte_lm.INIT_SIGMA)
    return fp8jax.nnx.MoE(
        c.d_model,
        c.d_expert,
        c.experts,
        top_k=c.top_k,
        num_groups=c.groups,
        top_groups=c.top_groups,
        num_shared=c.shared,
        dtype=jnp.bfloat16,
        kernel_init=init,
        router_init=init,
        shared_init=init,
        rngs=rngs,
        recipe=OFF,
    )


class Block(nnx.Module):
    """Pre-norm attention and MLP or experts, [batch, time, d_model] to the same."""

    def __init__(self, c: Config, rngs: nnx.Rngs, with_experts: bool):
        self.norm_1, self.norm_2 = norm(c.d_model, rngs), norm(c.d_model, rngs)
        self.attention = LatentAttention(c, rngs)
        self.mlp = mixture(c, rngs) if with_experts else DenseMLP(c, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class LanguageModel(nnx.Module):
    """Logits float32 [batch, time, VOCABULARY] of the next byte, and one further."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.c = c
        init = nnx.initializers.normal(byte_lm.INIT_SIGMA)
        self.embed = nnx.Embed(
            byte_lm.VOCABULARY,
            c.d_model,
            dtype=jnp.bfloat16,
            embedding_init=init,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [Block(c, rngs, with_experts=i > 0) for i in range(c.layers)]
        )
        self.norm = norm(c.d_model, rngs)
        self.head = linear(c.d_model, byte_lm.VOCABULARY, c, rngs)
        # Multi-token prediction: DeepSeek-V3, arXiv:2412.19437, section 2.2.
        self.mtp_norm_h, self.mtp_norm_e = norm(c.d_model, rngs), norm(c.d_model, rngs)
        self.mtp_in = linear(2 * c.d_model, c.d_model, c, rngs)
        self.mtp_block = Block(c, rngs, with_experts=True)
        self.mtp_norm = norm(c.d_model, rngs)

    def trunk(self, tokens: jax.Array) -> jax.Array:
        """The stack's output before its last norm."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x)).astype(jnp.float32)

    def further(self, x: jax.Array, following: jax.Array) -> jax.Array:
        """Logits of one byte further, given the bytes in between."""
        e = self.mtp_norm_e(self.embed(following))
        x = self.mtp_in(jnp.concatenate([self.mtp_norm_h(x), e], axis=-1))
        return self.head(self.mtp_norm(self.mtp_block(x))).astype(jnp.float32)

    def routers(self) -> list[fp8jax.nnx.MoE]:
        """The mixtures, the multi-token prediction's last."""
        blocks = (*self.blocks, self.mtp_block)
        return [b.mlp for b in blocks if isinstance(b.mlp, fp8jax.nnx.MoE)]


# Training.

_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def loss_fn(model: LanguageModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is minimized, and the next byte's part of it, in nats a byte.

    Args:
        model: the model.
        tokens: int32 [batch, time + 2].
    """
    x = model.trunk(tokens[:, :-2])
    loss = _cross_entropy(model.logits(x), tokens[:, 1:-1]).mean()
    further = model.further(x, tokens[:, 1:-1])
    return loss + MTP_WEIGHT * _cross_entropy(further, tokens[:, 2:]).mean(), loss


@nnx.jit
def train_step(
    model: LanguageModel, optimizer: nnx.Optimizer, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One AdamW step and one of the routers' biases.

    Returns:
        The next byte's loss, and each mixture's load, int32 [mixtures, experts].
    """
    (_, loss), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, tokens)
    optimizer.update(model, grads)
    load = jnp.stack([moe.router.load[...] for moe in model.routers()])
    fp8jax.nnx.balance(model, model.c.balance_rate)
    return loss, load


@nnx.jit
def next_byte_loss(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """The next byte's part of the loss over [batch, time + 2], in BF16."""
    logits = model.logits(model.trunk(tokens[:, :-2]))
    return _cross_entropy(logits, tokens[:, 1:-1]).mean()


# What comes out.


def imbalance(load: np.ndarray) -> np.ndarray:
    """Of loads [..., experts] the busiest expert's, over the mean."""
    return load.max(axis=-1) / load.mean(axis=-1)


def write_load(
    arms: dict[str, byte_lm.Outcome], names: list[str], out: pathlib.Path
) -> None:
    """Writes load.csv: each expert's share of the tokens in the last tenth of steps."""
    with open(out / "load.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "mixture", "expert", "share"])
        for arm, outcome in arms.items():
            (load,) = outcome.watched  # [steps, mixtures, experts]
            last = load[-max(1, len(load) // 10) :].sum(axis=0)
            for name, row in zip(
                names, last / last.sum(-1, keepdims=True), strict=True
            ):
                for expert, share in enumerate(row):
                    writer.writerow([arm.lower(), name, expert, f"{share:.5f}"])


def plot_load(
    arms: dict[str, byte_lm.Outcome], names: list[str], path: pathlib.Path
) -> None:
    """Draws the busiest expert's load over the run, and all experts' at its end."""
    matplotlib.use("Agg")  # No display needed.
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2,
        len(names),
        figsize=(3.5 * len(names), 5),
        layout="constrained",
        squeeze=False,
    )
    for i, name in enumerate(names):
        top, bottom = axes[:, i]
        for place, (arm, outcome) in enumerate(arms.items()):
            load = outcome.watched[0][:, i]  # [steps, experts]
            width = max(1, len(load) // 20)
            over = byte_lm.smooth(imbalance(load), width)
            top.plot(np.arange(width, len(load) + 1), over, label=arm)
            last = load[-max(1, len(load) // 10) :].sum(axis=0)
            at = np.arange(load.shape[1]) + (place - 0.5) * 0.4
            bottom.bar(at, last / last.mean(), width=0.4)
        top.axhline(1, color="0.7", linewidth=0.8)
        bottom.axhline(1, color="0.7", linewidth=0.8)
        top.set_title(name)
        top.set_xlabel("step (running mean)")
        bottom.set_xlabel("expert, in the last tenth of the steps")
    axes[0, 0].set_ylabel("busiest expert's load / mean")
    axes[1, 0].set_ylabel("load / mean")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The command line.


def config_from_flags() -> Config:
    """Returns the preset with the flags' overrides, or ends the program."""
    c = byte_lm.config_from_flags(PROGRAM, PRESETS)
    if c.layers < 2:
        byte_lm.fail(PROGRAM, "--layers must be at least 2, the first has no experts.")
    if c.rope_dim % 2:
        byte_lm.fail(PROGRAM, f"--rope_dim must be even, got {c.rope_dim}.")
    in_groups = c.experts % c.groups == 0 and c.top_groups <= c.groups
    if not in_groups or c.top_k > c.top_groups * (c.experts // c.groups):
        byte_lm.fail(
            PROGRAM,
            "--experts must be a multiple of --groups, and --top_groups of them must "
            f"have --top_k experts, got {c.experts}, {c.groups}, {c.top_groups} and "
            f"{c.top_k}.",
        )
    return c


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # JAX lists the backends it does not find.
    console, config = Console(), config_from_flags()
    out = byte_lm.make_out_folder(PROGRAM, pathlib.Path(FLAGS.out))
    # One byte more than a plain language model's: the one after the next.
    window = config.seq_len + 1
    train_text, heldout_text = byte_lm.load_text(PROGRAM, FLAGS.corpus, window)

    text = jnp.asarray(train_text)
    heldout = byte_lm.heldout_batches(heldout_text, config.batch, window)
    key = jax.random.key(FLAGS.seed)

    def next_batch(step: int) -> jax.Array:
        return byte_lm.draw_batch(text, key, step, config.batch, window)

    start = LanguageModel(config, nnx.Rngs(FLAGS.seed))
    transformation = byte_lm.adamw(config.learning_rate, config.steps)

    def fresh() -> tuple[LanguageModel, nnx.Optimizer]:
        model = nnx.clone(start)
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    size = sum(p.size for p in jax.tree.leaves(nnx.state(start, nnx.Param)))
    batch_tokens = config.batch * config.seq_len
    console.print(
        f"{size / 1e6:.1f} M parameters, {config.steps} steps of {batch_tokens} tokens "
        f"an arm, {text.size / 1e6:.1f} MB of text, on {jax.devices()[0].device_kind}",
        highlight=False,
    )

    recipe = byte_lm.RECIPES[FLAGS.recipe]()
    fp8_step = fp8jax.fp8_transform(train_step, recipe)
    print(fp8_step.report(*fresh(), next_batch(0)))

    arms = {}
    with byte_lm.progress_bar(console) as progress:
        for name, step in {"BF16": train_step, "FP8": fp8_step}.items():

            def run(state, tokens, step=step):
                return state, *step(*state, tokens)

            arms[name] = byte_lm.train(
                run,
                fresh(),
                next_batch,
                lambda state: np.mean([next_byte_loss(state[0], b) for b in heldout]),
                config.steps,
                progress,
                name,
            )
    byte_lm.write_results(arms, batch_tokens, out, console)
    names = [f"layer {i}" for i in range(1, config.layers)] + ["multi-token prediction"]
    write_load(arms, names, out)
    plot_load(arms, names, out / "load.png")
    for name, arm in arms.items():
        last = imbalance(arm.watched[0][-max(1, config.steps // 10) :]).mean(axis=0)
        shown = ", ".join(f"{x:.2f}" for x in last)
        console.print(f"{name}: busiest expert's load over the mean: {shown}.")
    console.print(f"Wrote load.csv and load.png to {out}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
