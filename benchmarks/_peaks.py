"""What a card can do by its data sheet, which measured figures are held against."""

import jax

PEAK_TFLOPS = 1979  # Dense FP8 of an H100 or H200; BF16's is half.
PEAK_RATIO = 2.0  # Of FP8's peak to BF16's.
H200 = "NVIDIA H200"
MEMORY_GBPS = {H200: 4800, "NVIDIA H100 80GB HBM3": 3350}


def memory_ceiling() -> str:
    """Of the first device, as it is printed."""
    card = jax.devices()[0].device_kind
    return f"{MEMORY_GBPS[card]} GB/s" if card in MEMORY_GBPS else f"unknown of {card}"
