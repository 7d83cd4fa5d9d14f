"""The config of a GEMM with its reasons: a function of the shape, no GPU needed."""

import dataclasses

from fp8jax.kernels.mosaic_gpu import (
    CHUNK,
    SMEM_BYTES,
    GemmConfig,
    GemmKind,
    GemmProblem,
    computed_config,
    measured_entry,
    smem_bytes,
)

# What an H100 or H200 has. A multiprocessor does 8192 dense FP8 operations, moves 128
# bytes of shared memory and starts 128 float32 instructions in a cycle.
_PEAK_TFLOPS, _PEAK_SMS = 1979, 132
_FLOPS_PER_CYCLE, _SMEM_BYTES_PER_CYCLE, _FP32_PER_CYCLE = 8192, 128, 128
_CYCLES_PER_US = _PEAK_TFLOPS * 1e6 / (_PEAK_SMS * _FLOPS_PER_CYCLE)
_MEMORY_GB_PER_S = 4300  # That a large copy reaches on an H200; an H100 has 0.7 of it.

# Instructions to promote an element: the fused sum, and in 1d1d the product of scales.
_PROMOTION = {"1d2d": 1, "1d1d": 2}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What runs for a shape, and why; times are a model's, not measured.

    Attributes:
        problem: the shape.
        num_sms: multiprocessors to fill.
        config: what runs.
        source: where it comes from.
        blocks: rows and columns of the grid of output blocks.
        waves: rounds of blocks that the busiest multiprocessor works on.
        wave_efficiency: elements of the output over those that all multiprocessors
            compute in that many rounds; 1 is full.
        smem_bytes: of a CTA.
        bounds_us: resource to the least microseconds that it needs.
        reasons: sentences.
    """

    problem: GemmProblem
    num_sms: int
    config: GemmConfig
    source: str
    blocks: tuple[int, int]
    waves: int
    wave_efficiency: float
    smem_bytes: int
    bounds_us: dict[str, float]
    reasons: tuple[str, ...]

    @property
    def limit(self) -> str:
        """The resource that bounds the time."""
        return max(self.bounds_us, key=lambda name: self.bounds_us[name])

    def tflops(self, resource: str) -> float:
        """What the resource alone would allow."""
        p = self.problem
        return 2 * p.m * p.n * p.k / self.bounds_us[resource] * 1e-6

    def __str__(self) -> str:
        p, (low, high) = self.problem, self.problem.bucket
        fields = dataclasses.asdict(self.config).items()
        lines = [
            f"{p.kind} GEMM [{p.m}, {p.k}] x [{p.n}, {p.k}] transposed, {p.out_dtype} "
            f"out, {self.num_sms} SMs",
            f"config      {', '.join(f'{name}={value}' for name, value in fields)}",
            f"from        {self.source}",
            f"bucket      m of {low} to {high} share an entry of a tuning table",
            f"blocks      {self.blocks[0]} x {self.blocks[1]}, {self.waves} waves, "
            f"wave efficiency {self.wave_efficiency:.1%}",
            f"smem        {self.smem_bytes} of {SMEM_BYTES} bytes a CTA",
            "at best     "
            + ", ".join(
                f"{name} {us:.1f} us ({self.tflops(name):.0f} TFLOPS)"
                for name, us in self.bounds_us.items()
            ),
            f"bound by    {self.limit} (a model; peak {_PEAK_TFLOPS} TFLOPS)",
            *(f"- {reason}" for reason in self.reasons),
        ]
        return "\n".join(lines)


def explain(
    kind: GemmKind,
    m: int,
    n: int,
    k: int,
    *,
    out_dtype: str = "bfloat16",
    num_sms: int = _PEAK_SMS,
) -> Explanation:
    """The config for `[m, k]` times `[n, k]` transposed, with its reasons.

    Args:
        kind: "1d2d" (fprop, dgrad) or "1d1d" (wgrad).
        m, n, k: sides; for wgrad, k counts tokens.
        out_dtype: "bfloat16" or "float32".
        num_sms: multiprocessors of the GPU.
    """
    problem = GemmProblem(kind, m, n, k, out_dtype)
    entry = measured_entry(problem, num_sms)
    if entry is None:
        config = computed_config(kind, m, n, k, out_dtype, num_sms)
        source = "computed from the shape; no loaded table knows it"
    else:
        config = entry.config
        source = (
            f"the loaded table: measured {entry.us:.1f} us at m={entry.problem.m}, the "
            f"computed config {entry.computed_us:.1f} us"
        )
    rows, columns = (-(-a // b) for a, b in zip((m, n), config.covers, strict=True))
    # Clusters take whole groups of rows, and leave SMs over that make up none.
    ctas = num_sms // config.cluster * config.cluster
    waves = -(-(-(-rows // config.cluster) * config.cluster * columns) // ctas)
    computed = waves * num_sms * config.block_m * config.block_n
    bounds = _bounds(problem, config, waves)
    return Explanation(
        problem=problem,
        num_sms=num_sms,
        config=config,
        source=source,
        blocks=(rows, columns),
        waves=waves,
        wave_efficiency=m * n / computed,
        smem_bytes=smem_bytes(kind, config),
        bounds_us=bounds,
        reasons=tuple(_reasons(problem, config, rows, columns, num_sms)),
    )


def _bounds(problem: GemmProblem, config: GemmConfig, waves: int) -> dict[str, float]:
    """Microseconds that each resource needs if nothing else takes any time."""
    steps = waves * -(-problem.k // CHUNK)  # Chunks that the busiest SM multiplies.
    block = config.block_m * config.block_n
    # A chunk is written once, and each warpgroup reads its parts of it.
    read = config.warpgroups * (config.wg_m + config.wg_n)
    rows = config.block_m + config.block_n + read
    per_chunk = {
        "tensor cores": 2 * block * CHUNK / _FLOPS_PER_CYCLE,
        "shared memory": rows * CHUNK / _SMEM_BYTES_PER_CYCLE,
        "promotion": block * _PROMOTION[problem.kind] / _FP32_PER_CYCLE,
    }
    bounds = {name: steps * c / _CYCLES_PER_US for name, c in per_chunk.items()}
    out_bytes = 4 if problem.out_dtype == "float32" else 2
    moved = (problem.m + problem.n) * problem.k + problem.m * problem.n * out_bytes
    return bounds | {"device memory": moved / _MEMORY_GB_PER_S * 1e-3}


def _reasons(
    problem: GemmProblem, config: GemmConfig, rows: int, columns: int, num_sms: int
) -> list[str]:
    reasons = []
    if problem.m < config.covers[0]:
        reasons.append(
            f"m={problem.m} fills {problem.m} of {config.covers[0]} rows of a block: "
            "the rest is computed and dropped."
        )
    if config.turned:
        reasons.append(
            "The transposed product is made: columns of the output, not its few rows, "
            "fill the 64 rows of a wgmma, which reads them all from shared memory."
        )
    blocks = rows * columns
    if blocks < num_sms and not config.turned:  # Half of them read as fast as all.
        reasons.append(
            f"{blocks} blocks leave {num_sms - blocks} of {num_sms} SMs without work; "
            "narrower blocks put more of them to reading the rhs."
        )
    if config.cluster > 1:
        reasons.append(
            f"{config.cluster} CTAs, neighbours along m, fetch each rhs block once "
            "between them."
        )
    if config.chunks > 1:
        reasons.append(
            f"A stage holds {config.chunks} chunks of {CHUNK} of k: one wait for all."
        )
    if config.accumulators > 1:
        reasons.append(
            f"{config.accumulators} products a warpgroup in flight: one is promoted "
            "while tensor cores fill the next."
        )
    if problem.kind == "1d1d":
        reasons.append(
            "Both scales vary along the block, so that promotion takes two "
            "instructions an element."
        )
    if problem.k % CHUNK:
        reasons.append(f"k={problem.k} is no multiple of {CHUNK}: a zero-padded copy.")
    reasons.append(
        "Shapes are static in JAX: another m is another program, and compiles on its "
        "first call, in this bucket or not. Pad m to few sizes to compile few programs."
    )
    return reasons
