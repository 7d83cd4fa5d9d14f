"""Strict JAX settings for every test, and the skip of GPU tests where there is none."""

import ctypes
import gc
import importlib.util
import os
import pathlib
from collections.abc import Iterator


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# Without a driver the CUDA plugin can compile, but refuses to start as a platform.
_PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"
if any(map(importlib.util.find_spec, _PLUGINS)) and not _has_driver():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Processes that share a GPU must not each take most of its memory.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Nor each have NumPy's products on all cores, whose threads wait by spinning.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Eight CPU devices, so that sharding is tested on every machine. Before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import _h100
from fp8jax import _lowered_once
from fp8jax.ops import _spread
from tests import compiling

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-compiled",
        action="store_true",
        help="tests marked compiled fail where they would be skipped",
    )
    parser.addoption(
        "--require-interop",
        action="store_true",
        help="fail where torch, transformers or accelerate is missing",
    )
    parser.addoption(
        "--optimized",
        action="store_true",
        help="XLA:CPU compiles every test's programs as it does users'; takes longer",
    )


def pytest_configure(config: pytest.Config) -> None:
    """What is set before a backend starts; workers and subprocesses inherit it."""
    if config.getoption("--require-interop"):
        needed = ("accelerate", "torch", "transformers")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise pytest.UsageError(f"--require-interop: no {', '.join(missing)} here.")
    compiling.emit_fusions_as_before()
    if hasattr(config, "workerinput"):
        return
    if config.option.markexpr == "gpu":
        compiling.tune_nothing()
    compiling.share(config)


def _hopper_missing() -> str | None:
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) == "9.0":
        return None
    return (
        "needs a GPU of compute capability 9.0, found "
        f"{device.platform} ({device.device_kind})"
    )


# Some of every floor: what runs in a minute, for before each commit.
_QUICK = (
    *("numerics", "recipes", "testing", "cli", "transform/passes"),
    *("test_compat.py", "test_dispatch.py", "test_layers.py", "test_lowered_once.py"),
    *("kernels/test_available.py", "quant/test_qtensor.py", "ops/test_spread.py"),
    *("transform/test_report.py", "transform/test_cost.py", "transform/test_tree.py"),
    *("nnx/test_tabulate.py", "checkpoint/test_reader.py"),
)


def pytest_ignore_collect(
    collection_path: pathlib.Path, config: pytest.Config
) -> bool | None:
    """With `-m gpu` and the like, files without a test of that kind are not imported.

    Each worker would, with what they import and compute as they are.
    """
    kind = config.option.markexpr
    if kind not in ("gpu", "compiled") or not collection_path.name.startswith("test_"):
        return None
    return f"mark.{kind}" not in collection_path.read_text() or None


@pytest.hookimpl(tryfirst=True)  # Before what `-m` leaves out.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if compiling.lies_in(item, _QUICK):
            item.add_marker("quick")
    items[:] = compiling.in_order(items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _hopper_missing() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Collections of garbage leave out what was imported, most of all objects.

    They also come less often: traces make many objects, few of them garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    compiling.prepare(item)
    if not item.get_closest_marker("compiled"):
        return
    try:
        _h100.devices(1)
    except RuntimeError as reason:
        required = item.config.getoption("--require-compiled")
        (pytest.fail if required else pytest.skip)(str(reason))


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that are not about a GPU run on the CPU, whose arithmetic they count on."""
    if request.node.get_closest_marker("gpu"):
        with pytest.MonkeyPatch.context() as patch:
            if compiling.lies_in(request.node, ("kernels",)):
                # Programs of one kernel: what is compiled ahead is compiled twice.
                patch.setattr(_lowered_once, "_compile_ahead", lambda made: None)
            yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """For tests of compiling itself: nothing is loaded that a worker shared."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()  # JAX looks at it once.
        if not enabled:
            yield


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no array can be split: the tests' process has eight devices."""
    monkeypatch.setattr(_spread, "_is_only_device", lambda: True)


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For optimizers, which count in integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
