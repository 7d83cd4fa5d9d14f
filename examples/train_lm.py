"""Trains one byte-level language model twice, in BF16 and in FP8, and compares.

The text is the Python standard library's own sources (about 30 MB). Both arms start
from the same weights and see the same batches. The second arm is the first one's jitted
train step wrapped by `fp8jax.fp8_transform`; the model does not change.

    python examples/train_lm.py                  # some minutes on two CPU cores
    python examples/train_lm.py --preset h200    # 85 M parameters on one H200

It writes loss.csv, loss.png and summary.csv into --out. On a CPU, FP8 is emulated in
float32 and therefore slower than BF16: only the losses are worth comparing there. So
short a run is chaotic: other rounding of the initial weights alone, without FP8, moves
the final loss by up to half a percent, so a gap of that size is no finding.
"""

import csv
import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags, logging
from flax.training import train_state
from rich import progress as bars
from rich.console import Console
from rich.table import Table

import fp8jax

VOCABULARY = 256  # Every byte is a token.
HELDOUT_SHARE = 0.05  # Of the files, by a hash of their content.
HELDOUT_BATCHES = 16
WARMUP_SHARE = 0.1  # Of the steps, from zero to the full learning rate.
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
INIT_SIGMA = 0.02
ROPE_BASE = 10_000.0
FINAL_SHARE = 0.1  # The training loss in the table is the mean over the last steps.
FETCH_EVERY = 10  # Steps between two looks at the loss; the device runs ahead of them.

Attention = Literal["xla", "cudnn"]  # `jax.nn.dot_product_attention` has these.


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
RECIPES = {
    "deepseek_v3": fp8jax.recipes.deepseek_v3,
    "deepseek_v3_fp32": functools.partial(fp8jax.recipes.deepseek_v3, scale="fp32"),
    "blocked_wgrad": fp8jax.recipes.blocked_wgrad,
    "bf16_wgrad": fp8jax.recipes.bf16_wgrad,
}

flags.DEFINE_enum("preset", "cpu", sorted(PRESETS), "Sizes to start from.")
flags.DEFINE_enum("recipe", "deepseek_v3", sorted(RECIPES), "How FP8 is used.")
flags.DEFINE_enum(
    "attention",
    "auto",
    ["auto", "xla", "cudnn"],
    "jax.nn.dot_product_attention's implementation; auto tries cudnn on a GPU.",
)
flags.DEFINE_integer("seed", 0, "Seed of the weights and of the batches.", 0, 2**31 - 1)
flags.DEFINE_string("out", "runs/train_lm", "Folder for the curves and tables.")
flags.DEFINE_string(
    "corpus", None, "Folder of .py files to learn; default: the standard library."
)
for field in dataclasses.fields(Config):
    define = flags.DEFINE_float if field.type is float else flags.DEFINE_integer
    define(field.name, None, f"Overrides the preset's {field.name}.")
FLAGS = flags.FLAGS


# The text.


def read_corpus(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training and the held-out bytes of all .py files under `folder`.

    A file's side depends on its content alone, so copies of one file never lie on both.
    """
    train, heldout = [], []
    for path in sorted(folder.rglob("*.py")):
        # Installed packages lie inside the standard library's folder.
        if "site-packages" in path.relative_to(folder).parts or not path.is_file():
            continue
        text = path.read_bytes()
        digest = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        (heldout if digest < HELDOUT_SHARE * 2**64 else train).append(text)
    train_text, heldout_text = b"".join(train), b"".join(heldout)
    return np.frombuffer(train_text, np.uint8), np.frombuffer(heldout_text, np.uint8)


@functools.partial(jax.jit, static_argnames=("batch", "seq_len"))
def draw_batch(
    text: jax.Array, key: jax.Array, step: int, batch: int, seq_len: int
) -> jax.Array:
    """Returns `batch` random windows of `text`, int32 [batch, seq_len + 1]."""
    last = text.shape[0] - seq_len - 1
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, last + 1)
    window = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=seq_len + 1)
    return jax.vmap(window, in_axes=(None, 0))(text, starts).astype(jnp.int32)


def heldout_batches(text: np.ndarray, config: Config) -> jax.Array:
    """Returns evenly spaced windows, int32 [batches, batch, seq_len + 1]."""
    count = HELDOUT_BATCHES * config.batch
    starts = np.linspace(0, text.size - config.seq_len - 1, count).astype(int)
    windows = text[starts[:, None] + np.arange(config.seq_len + 1)]
    return jnp.asarray(windows, jnp.int32).reshape(HELDOUT_BATCHES, config.batch, -1)


# The model: plain Flax, nothing in it knows of FP8.


def rotate(x: jax.Array) -> jax.Array:
    """Applies rotary position embedding to `x` [batch, time, heads, size]."""
    half = x.shape[-1] // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # [time, 1, half]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, x [batch, time, d_model] to the same shape."""

    config: Config
    attention: Attention

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        norm = functools.partial(nn.RMSNorm, dtype=jnp.bfloat16)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16)
        wide = nn.initializers.normal(INIT_SIGMA)
        # Smaller, so that the residual stream keeps its size in a deep model.
        back = nn.initializers.normal(INIT_SIGMA / math.sqrt(2 * c.layers))

        h = dense(3 * c.d_model, kernel_init=wide, name="qkv")(norm(name="norm_1")(x))
        h = h.reshape(*x.shape[:2], 3, c.heads, c.d_model // c.heads)
        q, k, v = (h[:, :, i] for i in range(3))  # [batch, time, heads, size]
        h = jax.nn.dot_product_attention(
            rotate(q), rotate(k), v, is_causal=True, implementation=self.attention
        )
        x = x + dense(c.d_model, kernel_init=back, name="out")(h.reshape(x.shape))

        h = dense(2 * c.d_ff, kernel_init=wide, name="up")(norm(name="norm_2")(x))
        gate, h = jnp.split(h, 2, axis=-1)
        h = dense(c.d_model, kernel_init=back, name="down")(jax.nn.silu(gate) * h)
        return x + h, None


class LanguageModel(nn.Module):
    """Maps tokens [batch, time] to logits float32 [batch, time, VOCABULARY]."""

    config: Config
    attention: Attention

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(INIT_SIGMA)
        x = nn.Embed(
            VOCABULARY,
            c.d_model,
            dtype=jnp.bfloat16,
            embedding_init=init,
            name="embed",
        )(tokens)
        # Stacked layers: compiled once, and one row of the report per kind of layer.
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
        )
        x, _ = blocks(c, self.attention, name="blocks")(x, None)
        x = nn.RMSNorm(dtype=jnp.bfloat16, name="norm")(x)
        logits = nn.Dense(
            VOCABULARY,
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


@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: train_state.TrainState, tokens: jax.Array
) -> tuple[train_state.TrainState, jax.Array]:
    """One AdamW step: BF16 compute, float32 master weights; the state is donated."""
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
    config: Config, attention: Attention, key: jax.Array
) -> train_state.TrainState:
    """Returns the state that both arms start from, float32 on the device."""
    model = LanguageModel(config, attention)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, int(WARMUP_SHARE * config.steps)),
        decay_steps=config.steps,
        end_value=0.1 * config.learning_rate,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY),
    )

    @jax.jit
    def create() -> train_state.TrainState:
        params = model.init(key, jnp.zeros((1, config.seq_len), jnp.int32))["params"]
        return train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optimizer
        )

    return create()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one arm did: losses float64 [steps], and times without the first step."""

    losses: np.ndarray
    heldout_loss: float
    tokens_per_second: float
    compile_seconds: float

    @property
    def train_loss(self) -> float:
        return float(self.losses[-max(1, int(FINAL_SHARE * self.losses.size)) :].mean())


def train(
    step: Callable,
    start: train_state.TrainState,
    next_batch: Callable[[int], jax.Array],
    heldout: jax.Array,
    config: Config,
    progress: bars.Progress,
    name: str,
) -> Outcome:
    """Runs `config.steps` steps of `step` from a copy of `start`, shown as `name`."""
    bar = progress.add_task(name, total=config.steps, loss="compiling")
    state = jax.tree.map(jnp.copy, start)  # The step donates its state.
    begin = time.perf_counter()
    state, loss = step(state, next_batch(0))
    loss.block_until_ready()
    compiled = time.perf_counter()

    losses = [loss]
    for i in range(1, config.steps):
        state, loss = step(state, next_batch(i))
        losses.append(loss)
        if i % FETCH_EVERY == 0:
            # An old loss: waiting for it leaves the device with work in its queue.
            old = i - FETCH_EVERY
            progress.update(bar, completed=old + 1, loss=f"{float(losses[old]):.3f}")
    jax.block_until_ready(state)
    seconds = time.perf_counter() - compiled
    progress.update(bar, completed=config.steps, loss=f"{float(losses[-1]):.3f}")

    return Outcome(
        losses=np.asarray(jax.device_get(losses), np.float64),
        heldout_loss=float(mean_loss(state, heldout)),
        tokens_per_second=(config.steps - 1) * config.batch * config.seq_len / seconds,
        compile_seconds=compiled - begin,
    )


# What comes out.


def result_table(arms: dict[str, Outcome]) -> Table:
    """The two arms side by side; gaps are relative to the first arm."""
    table = Table(title="Loss in nats a byte; gap relative to BF16")
    for column in ("arm", "training loss", "gap", "held-out loss", "gap", "tokens/s"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    reference = next(iter(arms.values()))
    for name, arm in arms.items():
        cells = [name]
        for loss in ("train_loss", "heldout_loss"):
            value, gap = getattr(arm, loss), ""
            if arm is not reference:
                gap = f"{value / getattr(reference, loss) - 1:+.3%}"
            cells += [f"{value:.4f}", gap]
        table.add_row(*cells, f"{arm.tokens_per_second:,.0f}")
    return table


def write_csv(arms: dict[str, Outcome], config: Config, out: pathlib.Path) -> None:
    """Writes loss.csv (a row a step) and summary.csv (a row an arm)."""
    with open(out / "loss.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", *(f"loss_{n.lower()}" for n in arms)])
        pairs = zip(*(arm.losses for arm in arms.values()), strict=True)
        for step, losses in enumerate(pairs, start=1):
            tokens = step * config.batch * config.seq_len
            writer.writerow([step, tokens, *(f"{loss:.6f}" for loss in losses)])

    reference = next(iter(arms.values()))
    rows = [
        {
            "arm": name.lower(),
            "train_loss": f"{arm.train_loss:.6f}",
            "heldout_loss": f"{arm.heldout_loss:.6f}",
            "relative_gap": f"{arm.train_loss / reference.train_loss - 1:.6f}",
            "tokens_per_second": f"{arm.tokens_per_second:.1f}",
            "device": jax.devices()[0].device_kind,
            "jax_version": jax.__version__,
            "fp8jax_version": fp8jax.__version__,
        }
        for name, arm in arms.items()
    ]
    with open(out / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` values, [n] to [n - width + 1]."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def plot_losses(arms: dict[str, Outcome], config: Config, path: pathlib.Path) -> None:
    """Draws both loss curves, and below them their relative gap."""
    matplotlib.use("Agg")  # No display needed.
    import matplotlib.pyplot as plt

    width = max(1, config.steps // 50)
    tokens = np.arange(1, config.steps + 1) * config.batch * config.seq_len / 1e6
    curves = {name: smooth(arm.losses, width) for name, arm in arms.items()}
    reference, other = curves.values()

    figure, (top, bottom) = plt.subplots(
        2, sharex=True, height_ratios=(3, 1), figsize=(7, 5), layout="constrained"
    )
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        top.plot(tokens[width - 1 :], losses, style, label=name)
    top.set_ylabel("training loss (nats a byte)")
    top.legend(frameon=False)
    bottom.axhline(0, color="0.7", linewidth=0.8)
    bottom.plot(tokens[width - 1 :], 100 * (other / reference - 1), color="C1")
    bottom.set_ylabel("FP8 gap (%)")
    bottom.set_xlabel(f"million tokens (running mean over {width} steps)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The command line.


def fail(message: str) -> NoReturn:
    """Ends the program with one line and exit code 2, for input at fault."""
    print(f"train_lm: {message}", file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line and exit code 2 for what it refuses."""
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        fail(str(error))
    if len(rest) > 1:
        fail(f"takes flags only, got {' '.join(rest[1:])}.")
    return rest


def config_from_flags() -> Config:
    """Returns the preset with the flags' overrides, or ends the program."""
    given = {f.name: FLAGS[f.name].value for f in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not (value > 0 and math.isfinite(value)):
            fail(f"--{name} must be positive, got {value}.")
    config = dataclasses.replace(PRESETS[FLAGS.preset], **given)
    if config.steps < 2:
        fail("--steps must be at least 2, as the first one compiles: got 1.")
    if config.d_model % (2 * config.heads):
        # Rotary embedding pairs up a head's dimensions.
        fail(
            "--d_model must be a multiple of twice --heads, "
            f"got {config.d_model} and {config.heads}."
        )
    return config


def make_out_folder() -> pathlib.Path:
    """Returns --out, made if need be, or ends the program if it cannot be written."""
    out = pathlib.Path(FLAGS.out)
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}.")
    return out


def load_text(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns training and held-out bytes, or ends the program if they are too few."""
    folder = pathlib.Path(FLAGS.corpus or sysconfig.get_path("stdlib"))
    train_text, heldout_text = read_corpus(folder)
    for side, text in (("training", train_text), ("held-out", heldout_text)):
        if text.size <= config.seq_len:
            fail(
                f"needs more than {config.seq_len} bytes of {side} text in .py files, "
                f"found {text.size} under {folder}; give a folder as --corpus."
            )
    return train_text, heldout_text


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
            fail(f"--attention cudnn does not work here: {reason}")
        print(f"Attention by xla, as cudnn does not work here: {reason}")
        return "xla"
    return "cudnn"


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # JAX lists the backends it does not find.
    console = Console()
    config, out = config_from_flags(), make_out_folder()
    train_text, heldout_text = load_text(config)
    attention = choose_attention(config)

    text, heldout = jnp.asarray(train_text), heldout_batches(heldout_text, config)
    weights_key, batches_key = jax.random.split(jax.random.key(FLAGS.seed))

    def next_batch(step: int) -> jax.Array:
        return draw_batch(text, batches_key, step, config.batch, config.seq_len)

    start = initial_state(config, attention, weights_key)
    size = sum(p.size for p in jax.tree.leaves(start.params))
    console.print(
        f"{size / 1e6:.1f} M parameters, {config.steps} steps of "
        f"{config.batch * config.seq_len} tokens an arm, {text.size / 1e6:.1f} MB of "
        f"text, {attention} attention, on {jax.devices()[0].device_kind}",
        highlight=False,
    )

    fp8_step = fp8jax.fp8_transform(train_step, RECIPES[FLAGS.recipe]())
    print(fp8_step.report(start, next_batch(0)))

    arms = {}
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("loss {task.fields[loss]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as progress:
        for name, step in {"BF16": train_step, "FP8": fp8_step}.items():
            arms[name] = train(step, start, next_batch, heldout, config, progress, name)

    console.print(result_table(arms))
    compiling = " and ".join(f"{a.compile_seconds:.0f} s" for a in arms.values())
    console.print(f"First steps, with compilation: {compiling}.", highlight=False)
    write_csv(arms, config, out)
    plot_losses(arms, config, out / "loss.png")
    console.print(f"Wrote loss.csv, loss.png and summary.csv to {out}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
