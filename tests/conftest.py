"""Strict JAX settings for every test, and the skip of GPU tests where there is none."""

import os
from collections.abc import Iterator

# Eight CPU devices, so that sharding is tested on every machine. Before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

from fp8jax.ops import _spread

jax.config.update("jax_numpy_dtype_promotion", "strict")


def _hopper_missing() -> str | None:
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) == "9.0":
        return None
    return (
        "needs a GPU of compute capability 9.0, found "
        f"{device.platform} ({device.device_kind})"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _hopper_missing() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that are not about a GPU run on the CPU, whose arithmetic they count on."""
    if request.node.get_closest_marker("gpu"):
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no array can be split: the tests' process has eight devices."""
    monkeypatch.setattr(_spread, "_is_only_device", lambda: True)
