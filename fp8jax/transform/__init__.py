"""`fp8_transform`: any jitted function, its matrix products in FP8."""

from fp8jax.transform._fp8_transform import Fp8Function, fp8_transform
from fp8jax.transform.plan import Report, Row, plot_statistics
from fp8jax.transform.profile import KernelTime, Profile, ProfileRow

__all__ = [
    "Fp8Function",
    "KernelTime",
    "Profile",
    "ProfileRow",
    "Report",
    "Row",
    "fp8_transform",
    "plot_statistics",
]
