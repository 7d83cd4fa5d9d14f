"""What the fused quantization kernels keep in shared memory, by the problem."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """How one CTA walks blocks of 128x128.

    Attributes:
        slots: for each input, how many of its blocks are in shared memory at a time.
        buffers: blocks of codes on their way to global memory.
        ctas_per_sm: CTAs that share a multiprocessor.
    """

    slots: tuple[int, ...]
    buffers: int
    ctas_per_sm: int


def blocks_config(inputs: int, itemsize: int, outputs: int) -> BlocksConfig:
    """Two blocks of every input where they fit: one is worked on, the next comes.

    One CTA a multiprocessor reads and writes faster than two or three do. The last of
    three inputs is done with first, and is fetched again at once: it needs one slot.

    Args:
        inputs: arrays that a block is computed from.
        itemsize: bytes of an element of theirs.
        outputs: arrays of codes.
    """
    buffers = min(outputs, 2)
    if inputs * itemsize <= 4:  # At most 64 KB of inputs a block.
        slots = (2,) * inputs
    elif inputs == 3 and itemsize == 2:
        slots = (2, 2, 1)
    elif inputs == 2:
        slots = (2, 1)
    else:
        slots, buffers = (1,) * inputs, 1
    return BlocksConfig(slots, buffers, ctas_per_sm=1)
