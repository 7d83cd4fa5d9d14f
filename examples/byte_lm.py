"""What the training examples share: text, batches, loop, tables and command line."""

import csv
import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import flags
from rich import progress as bars
from rich.console import Console
from rich.table import Table

import fp8jax

VOCABULARY = 256  # Every byte is a token.
INIT_SIGMA = 0.02
HELDOUT_SHARE = 0.05  # Of the files, by a hash of their content.
HELDOUT_BATCHES = 16
WARMUP_SHARE = 0.1  # Of the steps, from zero to the full learning rate.
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
ROPE_BASE = 10_000.0
FINAL_SHARE = 0.1  # The training loss in the table is the mean over the last steps.
FETCH_EVERY = 10  # Steps between two looks at the loss; the device runs ahead of them.

RECIPES = {
    "deepseek_v3": fp8jax.recipes.deepseek_v3,
    "deepseek_v3_fp32": functools.partial(fp8jax.recipes.deepseek_v3, scale="fp32"),
    "blocked_wgrad": fp8jax.recipes.blocked_wgrad,
    "bf16_wgrad": fp8jax.recipes.bf16_wgrad,
}

T = TypeVar("T")


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


def heldout_batches(text: np.ndarray, batch: int, seq_len: int) -> jax.Array:
    """Returns evenly spaced windows, int32 [batches, batch, seq_len + 1]."""
    count = HELDOUT_BATCHES * batch
    starts = np.linspace(0, text.size - seq_len - 1, count).astype(int)
    windows = text[starts[:, None] + np.arange(seq_len + 1)]
    return jnp.asarray(windows, jnp.int32).reshape(HELDOUT_BATCHES, batch, -1)


# The model and its training.


def rotate(x: jax.Array) -> jax.Array:
    """Applies rotary position embedding to `x` [batch, time, heads, size]."""
    half = x.shape[-1] // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # [time, 1, half]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a warm-up and a cosine down to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=max(1, int(WARMUP_SHARE * steps)),
        decay_steps=steps,
        end_value=0.1 * learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY),
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one arm did: losses float64 [steps], and times without the first step.

    Attributes:
        watched: what else each step gave, [steps, ...] each.
    """

    losses: np.ndarray
    watched: list[np.ndarray]
    heldout_loss: float
    tokens_per_second: float
    compile_seconds: float

    @property
    def train_loss(self) -> float:
        return float(self.losses[-max(1, int(FINAL_SHARE * self.losses.size)) :].mean())


def train(
    step: Callable,
    state: Any,
    next_batch: Callable[[int], jax.Array],
    evaluate: Callable[[Any], Any],
    steps: int,
    progress: bars.Progress,
    name: str,
) -> Outcome:
    """Runs `steps` steps from `state`, which they may donate, shown as `name`.

    Args:
        step: of a state and a batch, to the next state, the loss and what else is to be
            watched.
        state: to start from.
        next_batch: tokens [batch, time] of a step.
        evaluate: held-out loss of the last state.
        steps: at least 2, as the first one compiles.
        progress: has the bar.
        name: of the arm.
    """
    bar = progress.add_task(name, total=steps, loss="compiling")
    begin = time.perf_counter()
    batch = next_batch(0)
    state, *seen = step(state, batch)
    jax.block_until_ready(seen)
    compiled = time.perf_counter()

    history = [seen]
    for i in range(1, steps):
        state, *seen = step(state, next_batch(i))
        history.append(seen)
        if i % FETCH_EVERY == 0:
            # An old loss: waiting for it leaves the device with work in its queue.
            old = i - FETCH_EVERY
            loss = f"{float(history[old][0]):.3f}"
            progress.update(bar, completed=old + 1, loss=loss)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - compiled
    progress.update(bar, completed=steps, loss=f"{float(history[-1][0]):.3f}")

    losses, *watched = (
        np.stack(values) for values in zip(*jax.device_get(history), strict=True)
    )
    return Outcome(
        losses=losses.astype(np.float64),
        watched=watched,
        heldout_loss=float(evaluate(state)),
        tokens_per_second=(steps - 1) * batch[:, 1:].size / seconds,
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


def write_csv(arms: dict[str, Outcome], batch_tokens: int, out: pathlib.Path) -> None:
    """Writes loss.csv (a row a step) and summary.csv (a row an arm)."""
    with open(out / "loss.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", *(f"loss_{n.lower()}" for n in arms)])
        pairs = zip(*(arm.losses for arm in arms.values()), strict=True)
        for step, losses in enumerate(pairs, start=1):
            writer.writerow(
                [step, step * batch_tokens, *(f"{loss:.6f}" for loss in losses)]
            )

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


def plot_losses(
    arms: dict[str, Outcome], batch_tokens: int, path: pathlib.Path
) -> None:
    """Draws both loss curves, and below them their relative gap."""
    matplotlib.use("Agg")  # No display needed.
    import matplotlib.pyplot as plt

    steps = len(next(iter(arms.values())).losses)
    width = max(1, steps // 50)
    tokens = np.arange(1, steps + 1) * batch_tokens / 1e6
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


def write_results(
    arms: dict[str, Outcome], batch_tokens: int, out: pathlib.Path, console: Console
) -> None:
    """Shows the table, and writes loss.csv, summary.csv and loss.png into `out`."""
    console.print(result_table(arms))
    compiling = " and ".join(f"{a.compile_seconds:.0f} s" for a in arms.values())
    console.print(f"First steps, with compilation: {compiling}.", highlight=False)
    write_csv(arms, batch_tokens, out)
    plot_losses(arms, batch_tokens, out / "loss.png")
    console.print(f"Wrote loss.csv, loss.png and summary.csv to {out}.")


# The command line.


def progress_bar(console: Console) -> bars.Progress:
    """A bar for each arm, with its loss."""
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("loss {task.fields[loss]}"),
        bars.TimeRemainingColumn(),
        console=console,
    )


def fail(program: str, message: str) -> NoReturn:
    """Ends the program with one line and exit code 2, for input at fault."""
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(2)


def define_flags(config: Any, presets: Mapping[str, Any], out: str) -> None:
    """Defines the flags of a training program: its sizes, and what all have.

    Args:
        config: dataclass of the sizes; each field is a flag that overrides a preset.
        presets: instances by name.
        out: default of --out.
    """
    flags.DEFINE_enum("preset", "cpu", sorted(presets), "Sizes to start from.")
    flags.DEFINE_enum("recipe", "deepseek_v3", sorted(RECIPES), "How FP8 is used.")
    flags.DEFINE_integer("seed", 0, "Of the weights and of the batches.", 0, 2**31 - 1)
    flags.DEFINE_string("out", out, "Folder for the curves and tables.")
    flags.DEFINE_string(
        "corpus", None, "Folder of .py files to learn; default: the standard library."
    )
    for field in dataclasses.fields(config):
        define = flags.DEFINE_float if field.type is float else flags.DEFINE_integer
        define(field.name, None, f"Overrides the preset's {field.name}.")


def config_from_flags(program: str, presets: Mapping[str, T]) -> T:
    """Returns the preset with the flags' overrides, or ends the program."""
    preset: Any = presets[flags.FLAGS.preset]
    given = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(preset)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not (value > 0 and math.isfinite(value)):
            fail(program, f"--{name} must be positive, got {value}.")
    config = dataclasses.replace(preset, **given)
    if config.steps < 2:
        fail(program, "--steps must be at least 2, as the first one compiles: got 1.")
    return config


def parse_flags(program: str, argv: list[str]) -> list[str]:
    """absl's parser, with one line and exit code 2 for what it refuses."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        fail(program, str(error))
    if len(rest) > 1:
        fail(program, f"takes flags only, got {' '.join(rest[1:])}.")
    return rest


def make_out_folder(program: str, out: pathlib.Path) -> pathlib.Path:
    """Returns --out, made if need be, or ends the program if it cannot be written."""
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(program, f"--out {out} cannot be written: {error.strerror}.")
    return out


def load_text(
    program: str, corpus: str | None, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns training and held-out bytes, or ends the program if they are too few."""
    folder = pathlib.Path(corpus or sysconfig.get_path("stdlib"))
    train_text, heldout_text = read_corpus(folder)
    for side, text in (("training", train_text), ("held-out", heldout_text)):
        if text.size <= seq_len:
            fail(
                program,
                f"needs more than {seq_len} bytes of {side} text in .py files, "
                f"found {text.size} under {folder}; give a folder as --corpus.",
            )
    return train_text, heldout_text
