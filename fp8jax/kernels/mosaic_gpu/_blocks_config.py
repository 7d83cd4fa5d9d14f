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


def blocks_config(inputs: int, itemsize: int, outputs: int) -> BlocksConfig:
    """Two blocks of every input where they fit: one is worked on, the next comes.

    One CTA a multiprocessor reads and writes faster than two or three do. The last of
    three inputs is done with first, and is fetched again at once: it needs one slot.

    Args:
        inputs: arrays that a block is computed from.
        itemsize: bytes of an element of theirs.
        outputs: arrays of codes.
    """
    if inputs == 1:
        return BlocksConfig((2,), min(outputs, 2), ctas_per_sm=1)
    # Of float32, a block is 64 KB: what fits is one buffer, and fewer slots.
    narrow = itemsize == 2
    slots = {
        2: (2, 2) if narrow else (2, 1),
        3: (2, 2, 1) if narrow else (1, 1, 1),
    }[inputs]
    return BlocksConfig(slots, min(outputs, 2) if narrow else 1, ctas_per_sm=1)
