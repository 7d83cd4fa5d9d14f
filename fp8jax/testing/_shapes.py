"""Matrix sizes that have names, shared by tests and benchmarks."""

import dataclasses

# Sides at which tiles, chunks and CTA blocks begin and end.
EDGE_SIZES = (1, 17, 127, 128, 129, 576, 1024)


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """`[m, k]` times `[n, k]` transposed.

    Attributes:
        name: of the layer it comes from.
        m, n, k: sides; 2 m n k is the work in FLOP.
    """

    name: str
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


# DeepSeek-V3's projections (hidden size 7168) over 4096 tokens and more, as DeepGEMM
# and cuBLASLt are measured on them.
GEMM_SHAPES = (
    GemmShape("attention output, half", 4096, 7168, 4096),
    GemmShape("attention output", 4096, 7168, 16384),
    GemmShape("square", 8192, 8192, 8192),
    GemmShape("expert up", 4096, 2048, 7168),
    GemmShape("expert gate and up", 4096, 4096, 7168),
    GemmShape("query up", 4096, 24576, 1536),
    GemmShape("key and value up", 4096, 32768, 512),
    GemmShape("expert down", 4096, 7168, 2048),
    GemmShape("expert down, long batch", 16384, 7168, 2048),
)
