"""Where a step's time goes on a GPU: what a profiler saw, by product."""

from fp8jax.transform.profile._measure import check_measurable, measured
from fp8jax.transform.profile._profile import KernelTime, Profile, ProfileRow
from fp8jax.transform.profile._tags import tagged

__all__ = [
    "KernelTime",
    "Profile",
    "ProfileRow",
    "check_measurable",
    "measured",
    "tagged",
]
