"""What the fused quantization kernels keep in shared memory, by the problem."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """How one CTA walks blocks of 128x128.

    Attributes:
        slots: for each input, how many of its blocks are in shared memory at a time.
        buffers: blocks of codes on their way to global memory.
        ctas_per_sm: CTAs that share a multiprocessor.
        warpgroups: that share a block, 1 or 2; 128x128 tiles take 1.
    """

    slots: tuple[int, ...]
    buffers: int
    ctas_per_sm: int
    warpgroups: int = 1


def blocks_config(
    inputs: int, itemsize: int, outputs: int, boxes: bool
) -> BlocksConfig:
    """What was fastest on an H200, at [16384, 7168] in bfloat16.

    Two blocks of every input where they fit, one worked on while the next comes, and
    one CTA a multiprocessor. One input is bound by memory, and two warpgroups meet too
    often; where there is something to compute, they are faster by a fifth. The last of
    three inputs is done with first, and is fetched again at once: it needs one slot.

    Args:
        inputs: arrays that a block is computed from.
        itemsize: bytes of an element of theirs.
        outputs: arrays of codes.
        boxes: whether there are 128x128 tiles.
    """
    buffers, warpgroups = min(outputs, 2), 1 if boxes else 2
    if inputs == 1:
        return BlocksConfig((2,), buffers, ctas_per_sm=1)
    if itemsize == 2:
        slots = (2, 2) if inputs == 2 else (2, 2, 1)
    else:  # A block is 64 KB: one buffer of codes fits beside three.
        slots, buffers = (2, 1) if inputs == 2 else (1, 1, 1), 1
    return BlocksConfig(slots, buffers, ctas_per_sm=1, warpgroups=warpgroups)
