"""Trains one byte-level language model twice, in BF16 and in FP8, and compares.

The text is the Python standard library's own sources (about 30 MB). Both arms start
from the same weights and see the same batches. The second arm is the first one's jitted
train step wrapped by `fp8jax.fp8_transform`; the model does not change.

    python examples/train_lm.py                  # some minutes on two CPU cores
    python examples/train_lm.py --preset h200    # 85 M parameters on one H200
    python examples/train_lm.py --parallel fsdp  # on all GPUs, or 8 emulated devices

It writes loss.csv, loss.png and summary.csv into --out. On a CPU, FP8 is emulated in
float32 and therefore slower than BF16: only the losses are worth comparing there. So
short a run is chaotic: other rounding of the initial weights alone, without FP8, moves
the final loss by up to half a percent, so a gap of that size is no finding.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import byte_lm
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from flax.training import train_state
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import fp8jax

PROGRAM = "train_lm"

Attention = Literal["xla", "cudnn"]  # `jax.nn.dot_product_attention` has these.
Parallel = Literal["none", "dp", "fsdp"]

EMULATED_DEVICES = 8  # Where --parallel finds no GPU.
SMALLEST_SPLIT = 2**14  # Elements; what has fewer, such as norms, is whole everywhere.


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of the run; every flag of the same name overrides one."""

    d_model: int
    layers: int
    heads: int
    d_ff: int  # Inner width of SwiGLU.
    seq_len: int
    batch: int  # Sequences a step.
    steps: int
    learning_rate: float


# NOTE: every width is a multiple of 128, the side of a quantization tile.
PRESETS = {
    "cpu": Config(
        d_model=128,
        layers=2,
        heads=2,
        d_ff=384,
        seq_len=128,
        batch=16,
        steps=500,
        learning_rate=2e-3,
    ),
    "h200": Config(
        d_model=768,
        layers=12,
        heads=12,
        d_ff=2048,
        seq_len=1024,
        batch=32,
        steps=763,  # 25 M tokens.
        learning_rate=1e-3,
    ),
}
byte_lm.define_flags(Config, PRESETS, "runs/train_lm")
flags.DEFINE_enum(
    "attention",
    "auto",
    ["auto", "xla", "cudnn"],
    "jax.nn.dot_product_attention's implementation; auto tries cudnn on a GPU.",
)
flags.DEFINE_enum(
    "parallel",
    "none",
    ["none", "dp", "fsdp"],
    "What is split over all devices: nothing (one device), batches (dp), or batches, "
    "weights and the optimizer's state (fsdp).",
)
FLAGS = flags.FLAGS


# The model: plain Flax, nothing in it knows of FP8.


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, x [batch, time, d_model] to the same shape."""

    config: Config
    attention: Attention
    activations: NamedSharding

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        norm = functools.partial(nn.RMSNorm, dtype=jnp.bfloat16)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16)
        wide = nn.initializers.normal(byte_lm.INIT_SIGMA)
        # Smaller, so that the residual stream keeps its size in a deep model.
        back = nn.initializers.normal(byte_lm.INIT_SIGMA / math.sqrt(2 * c.layers))

        h = dense(3 * c.d_model, kernel_init=wide, name="qkv")(norm(name="norm_1")(x))
        h = h.reshape(*x.shape[:2], 3, c.heads, c.d_model // c.heads)
        q, k, v = (h[:, :, i] for i in range(3))  # [batch, time, heads, size]
        h = jax.nn.dot_product_attention(
            byte_lm.rotate(q),
            byte_lm.rotate(k),
            v,
            is_causal=True,
            implementation=self.attention,
        )
        x = x + dense(c.d_model, kernel_init=back, name="out")(h.reshape(x.shape))

        h = dense(2 * c.d_ff, kernel_init=wide, name="up")(norm(name="norm_2")(x))
        gate, h = jnp.split(h, 2, axis=-1)
        h = dense(c.d_model, kernel_init=back, name="down")(jax.nn.silu(gate) * h)
        # Or XLA may split what a layer computes as its weights lie, not as the batch.
        return jax.lax.with_sharding_constraint(x + h, self.activations), None


class LanguageModel(nn.Module):
    """Maps tokens [batch, time] to logits float32 [batch, time, byte_lm.VOCABULARY]."""

    config: Config
    attention: Attention
    activations: NamedSharding

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(byte_lm.INIT_SIGMA)
        x = nn.Embed(
            byte_lm.VOCABULARY,
            c.d_model,
            dtype=jnp.bfloat16,
            embedding_init=init,
            name="embed",
        )(tokens)
        x = jax.lax.with_sharding_constraint(x, self.activations)
        # Stacked layers: compiled once, and one row of the report per kind of layer.
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
        )
        x, _ = blocks(c, self.attention, self.activations, name="blocks")(x, None)
        x = nn.RMSNorm(dtype=jnp.bfloat16, name="norm")(x)
        logits = nn.Dense(
            byte_lm.VOCABULARY,
            use_bias=False,
            dtype=jnp.bfloat16,
            kernel_init=init,
            name="head",
        )(x)
        return logits.astype(jnp.float32)


def loss_fn(apply: Callable, params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats a byte; `tokens` int32 [batch, time + 1]."""
    logits = apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


# Training.


def train_step(
    state: train_state.TrainState, tokens: jax.Array
) -> tuple[train_state.TrainState, jax.Array]:
    """One AdamW step: BF16 compute, float32 master weights."""
    loss, grads = jax.value_and_grad(functools.partial(loss_fn, state.apply_fn))(
        state.params, tokens
    )
    return state.apply_gradients(grads=grads), loss


@jax.jit
def mean_loss(state: train_state.TrainState, batches: jax.Array) -> jax.Array:
    """Loss of `state` over held-out `batches` [batches, batch, time + 1], in BF16."""
    one = functools.partial(loss_fn, state.apply_fn, state.params)
    return jax.lax.map(one, batches).mean()


def initial_state(
    config: Config,
    attention: Attention,
    parallel: Parallel,
    mesh: Mesh,
    key: jax.Array,
) -> train_state.TrainState:
    """Returns the state that both arms start from, float32, placed on the mesh."""
    model = LanguageModel(config, attention, NamedSharding(mesh, P("data")))
    optimizer = byte_lm.adamw(config.learning_rate, config.steps)

    def create() -> train_state.TrainState:
        tokens = jnp.zeros((config.batch, config.seq_len), jnp.int32)
        params = model.init(key, tokens)["params"]
        return train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optimizer
        )

    place = functools.partial(sharding_of, parallel=parallel, mesh=mesh)
    shardings = jax.tree.map(place, jax.eval_shape(create))
    return jax.jit(create, out_shardings=shardings)()


# Several devices.


def make_mesh(parallel: Parallel) -> Mesh:
    """All devices as one axis, or the first device; before JAX is used otherwise."""
    if parallel == "none":
        devices = jax.devices()[:1]
    else:
        if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", EMULATED_DEVICES)
        devices = jax.devices()
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def sharding_of(
    x: jax.ShapeDtypeStruct, parallel: Parallel, mesh: Mesh
) -> NamedSharding:
    """Of an array of the state: with fsdp its longest side is split, if it can be."""
    spec: list[str | None] = [None] * len(x.shape)
    if parallel == "fsdp" and x.size >= SMALLEST_SPLIT:
        side = x.shape.index(max(x.shape))
        if x.shape[side] % mesh.size == 0:
            spec[side] = "data"
    return NamedSharding(mesh, P(*spec))


# The command line.


def config_from_flags() -> Config:
    """Returns the preset with the flags' overrides, or ends the program."""
    config = byte_lm.config_from_flags(PROGRAM, PRESETS)
    if config.d_model % (2 * config.heads):
        # Rotary embedding pairs up a head's dimensions.
        byte_lm.fail(
            PROGRAM,
            "--d_model must be a multiple of twice --heads, "
            f"got {config.d_model} and {config.heads}.",
        )
    return config


parse_flags = functools.partial(byte_lm.parse_flags, PROGRAM)


def choose_attention(config: Config) -> Attention:
    """Returns --attention, with auto as cudnn if that compiles, or ends the program."""
    gpu = jax.default_backend() == "gpu"
    if FLAGS.attention == "xla" or (FLAGS.attention == "auto" and not gpu):
        return "xla"
    shape = (config.batch, config.seq_len, config.heads, config.d_model // config.heads)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attention = jax.nn.dot_product_attention
        y = attention(q, k, v, is_causal=True, implementation="cudnn")
        return y.astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(attend, argnums=(0, 1, 2))).lower(x, x, x).compile()
    except Exception as error:  # Which ones cudnn raises is not documented.
        reason = str(error).strip().partition("\n")[0]
        if FLAGS.attention == "cudnn":
            byte_lm.fail(PROGRAM, f"--attention cudnn does not work here: {reason}")
        print(f"Attention by xla, as cudnn does not work here: {reason}")
        return "xla"
    return "cudnn"


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # JAX lists the backends it does not find.
    console, config = Console(), config_from_flags()
    mesh = make_mesh(FLAGS.parallel)
    if config.batch % mesh.size:
        byte_lm.fail(
            PROGRAM,
            f"--batch must be a multiple of the {mesh.size} devices that share it, "
            f"got {config.batch}.",
        )
    out = byte_lm.make_out_folder(PROGRAM, pathlib.Path(FLAGS.out))
    train_text, heldout_text = byte_lm.load_text(PROGRAM, FLAGS.corpus, config.seq_len)
    attention = choose_attention(config)

    text = jnp.asarray(train_text)
    heldout = byte_lm.heldout_batches(heldout_text, config.batch, config.seq_len)
    heldout = jax.device_put(heldout, NamedSharding(mesh, P(None, "data")))
    by_batch = NamedSharding(mesh, P("data"))
    weights_key, batches_key = jax.random.split(jax.random.key(FLAGS.seed))

    def next_batch(step: int) -> jax.Array:
        sizes = config.batch, config.seq_len
        batch = byte_lm.draw_batch(text, batches_key, step, *sizes)
        return jax.device_put(batch, by_batch)

    start = initial_state(config, attention, FLAGS.parallel, mesh, weights_key)
    shardings = jax.tree.map(lambda x: x.sharding, start)
    # The state is donated, and the next one lies as it does.
    bf16_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    size = sum(p.size for p in jax.tree.leaves(start.params))
    batch_tokens = config.batch * config.seq_len
    console.print(
        f"{size / 1e6:.1f} M parameters, {config.steps} steps of {batch_tokens} tokens "
        f"an arm, {text.size / 1e6:.1f} MB of text, {attention} attention, on "
        f"{mesh.size} x {mesh.devices[0].device_kind}, parallel: {FLAGS.parallel}",
        highlight=False,
    )

    recipe = byte_lm.RECIPES[FLAGS.recipe]()
    fp8_step = fp8jax.fp8_transform(bf16_step, recipe)
    print(fp8_step.report(start, next_batch(0)))

    arms = {}
    with byte_lm.progress_bar(console) as progress:
        for name, step in {"BF16": bf16_step, "FP8": fp8_step}.items():
            arms[name] = byte_lm.train(
                step,
                jax.tree.map(jnp.copy, start),  # The step donates its state.
                next_batch,
                lambda state: mean_loss(state, heldout),
                config.steps,
                progress,
                name,
            )
    byte_lm.write_results(arms, batch_tokens, out, console)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
