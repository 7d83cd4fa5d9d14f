"""What this machine and this JAX can run."""

import jax

from fp8jax import _compat


def check_available(name: str) -> None:
    """Raises NotImplementedError, with the reason, where `name` cannot run here.

    The machine is that of JAX's default device: a kernel is chosen while a function is
    traced, when it is not known where the arrays will lie.
    """
    if name != "mosaic_gpu":
        return
    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if getattr(device, "compute_capability", None) != "9.0":
        raise NotImplementedError(
            "needs a GPU of compute capability 9.0 (Hopper), found "
            f"{device.platform} ({device.device_kind})."
        )
    if _compat.JAX_VERSION < (0, 11):
        raise NotImplementedError(
            f"needs JAX 0.11 or newer for its kernels, found {jax.__version__}."
        )
