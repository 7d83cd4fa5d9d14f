"""Kernels say what they need and what was found."""

import types

import jax
import pytest

from fp8jax import _compat
from fp8jax.kernels import check_available


@pytest.fixture(autouse=True)
def _no_default_device():
    with jax.default_device(None):  # The tests below say which devices there are.
        yield


def device(capability):
    return types.SimpleNamespace(
        platform="gpu", device_kind="a GPU", compute_capability=capability
    )


def test_xla_runs_everywhere():
    check_available("xla")


@pytest.mark.parametrize("capability", ["8.9", "10.0", None])
def test_other_gpus_are_named(monkeypatch, capability):
    monkeypatch.setattr(jax, "devices", lambda *_: [device(capability)])
    with pytest.raises(
        NotImplementedError, match=r"9\.0 \(Hopper\), found gpu \(a GPU"
    ):
        check_available("mosaic_gpu")


def test_hopper_is_taken_with_a_new_enough_jax(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [device("9.0")])
    monkeypatch.setattr(_compat, "JAX_VERSION", (0, 11, 0))
    check_available("mosaic_gpu")
    monkeypatch.setattr(_compat, "JAX_VERSION", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"needs JAX 0\.11 or newer"):
        check_available("mosaic_gpu")
