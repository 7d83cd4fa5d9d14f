"""Products of public dense models, by the sizes in their configs.

Each weight [out, in] is multiplied twice by 1x128 and 128x128 tiles: x times it in the
forward pass (n = out, k = in), and its output's gradient in the backward pass (n = in,
k = out).
"""

import hashlib
import itertools
from typing import NamedTuple

TOKENS = (4096, 8192, 16384, 32768)  # Rows of a product: a batch's tokens.
HALVES = ("tune", "report")


class Shape(NamedTuple):
    """[m, k] times [n, k] transposed."""

    m: int
    n: int
    k: int


class Model(NamedTuple):
    """Of a config.json: hidden_size, intermediate_size, heads, their keys, head_dim."""

    width: int
    hidden: int
    heads: int
    key_heads: int
    head: int

    @property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """Output and input features: of q; k and v; o; gate and up; down."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        return (
            (queries, self.width),
            (keys, self.width),
            (self.width, queries),
            (self.hidden, self.width),
            (self.width, self.hidden),
        )


MODELS = {
    "Llama 3.2 1B": Model(2048, 8192, 32, 8, 64),
    "Llama 3.2 3B": Model(3072, 8192, 24, 8, 128),
    "Llama 3 8B": Model(4096, 14336, 32, 8, 128),
    "Llama 3 70B": Model(8192, 28672, 64, 8, 128),
    "Qwen 3 0.6B": Model(1024, 3072, 16, 8, 128),
    "Qwen 3 1.7B": Model(2048, 6144, 16, 8, 128),
    "Qwen 3 4B": Model(2560, 9728, 32, 8, 128),
    "Qwen 3 8B": Model(4096, 12288, 32, 8, 128),
    "Qwen 3 14B": Model(5120, 17408, 40, 8, 128),
    "Qwen 3 32B": Model(5120, 25600, 64, 8, 128),
    "Mistral 7B": Model(4096, 14336, 32, 8, 128),
    "Mistral Nemo 12B": Model(5120, 14336, 32, 8, 128),
    "Mistral Small 24B": Model(5120, 32768, 32, 8, 128),
    "Gemma 3 1B": Model(1152, 6912, 4, 1, 256),
    "Gemma 3 4B": Model(2560, 10240, 8, 4, 256),
    "Gemma 3 12B": Model(3840, 15360, 16, 8, 256),
    "Gemma 3 27B": Model(5376, 21504, 32, 16, 128),
    "OLMo 2 1B": Model(2048, 8192, 16, 16, 128),
    "OLMo 2 7B": Model(4096, 11008, 32, 32, 128),
    "OLMo 2 13B": Model(5120, 13824, 40, 40, 128),
    "OLMo 2 32B": Model(5120, 27648, 40, 8, 128),
}


def shapes() -> list[Shape]:
    """Every product of every model at each number of tokens, none twice, sorted."""
    weights = itertools.chain.from_iterable(m.weights for m in MODELS.values())
    products = {(n, k) for pair in weights for n, k in (pair, pair[::-1])}
    return sorted(Shape(m, n, k) for m in TOKENS for n, k in products)


def half(shape: Shape) -> str:
    """ "tune" or "report", by a digest of the weight's sides in either order.

    All products of one weight, at any number of tokens, are on one side: what was
    chosen by the tuning half has seen none of the other's.
    """
    sides = "x".join(map(str, sorted(shape[1:])))
    return HALVES[hashlib.sha256(sides.encode()).digest()[0] % len(HALVES)]
