"""Whether the GPU kernels run on this machine."""

from fp8jax import _dispatch


def has_gpu_kernels() -> bool:
    """Whether products without an `implementation` run in a GPU's kernels here."""
    try:
        _dispatch.check_available("mosaic_gpu")
    except NotImplementedError:
        return False
    return True
