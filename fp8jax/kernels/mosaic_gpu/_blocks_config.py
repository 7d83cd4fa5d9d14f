"""What the fused quantization kernels keep in shared memory, by the problem."""

import dataclasses
from collections.abc import Collection, Sequence

# Blocks of 128x128 bytes in 227 KB of shared memory, beside scales and vectors.
_BLOCKS = 13


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """How one CTA walks blocks of 128x128.

    Attributes:
        slots: for each input, how many of its blocks are in shared memory at a time.
        buffers: blocks of codes on their way to global memory.
        ctas_per_sm: CTAs that share a multiprocessor.
        warpgroups: that share a block, 1 or 2.
    """

    slots: tuple[int, ...]
    buffers: int
    ctas_per_sm: int
    warpgroups: int = 1


def blocks_config(
    *,
    itemsizes: Sequence[int],
    outputs: int,
    computed: bool,
    kept: Collection[int],
    own: int,
) -> BlocksConfig:
    """What was fastest on an H200, at [16384, 7168] in bfloat16.

    Two blocks of every input where they fit, one worked on while the next comes, and
    one CTA a multiprocessor. One input is bound by memory, and two warpgroups meet too
    often; two CTAs hide what is computed of it. Where there is more to compute, two
    warpgroups are faster by a fifth. What no value is written over is done with first,
    and is fetched again at once: of three inputs such a one needs one slot. Where all
    are written over, two slots each are worth more than a second buffer.

    Args:
        itemsizes: bytes of an element, of each input.
        outputs: arrays of codes.
        computed: whether values are computed from the inputs.
        kept: inputs over which a value is written.
        own: bytes of an element of values that have a place of their own, in all.
    """
    if not computed:
        return BlocksConfig((2,), min(outputs, 2), ctas_per_sm=1)
    if list(itemsizes) == [2]:
        return BlocksConfig((2,), min(outputs, 2), ctas_per_sm=2)
    slots = [2] * len(itemsizes)
    if len(itemsizes) > 2:
        slots = [2 if number in kept else 1 for number in range(len(itemsizes))]
    every = len(kept) == len(itemsizes) > 2
    buffers = 1 if every or max(itemsizes) > 2 else min(outputs, 2)
    for number in reversed(range(len(slots))):
        held = sum(a * b for a, b in zip(slots, itemsizes, strict=True)) + own + buffers
        if held > _BLOCKS:
            slots[number] = 1
    return BlocksConfig(tuple(slots), buffers, ctas_per_sm=1, warpgroups=2)
