"""Strict JAX settings for every test, and the skip of GPU tests where there is none."""

import ctypes
import importlib.util
import os
import pathlib
import tempfile
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

# Eight CPU devices, so that sharding is tested on every machine. Before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

from benchmarks import _h100
from fp8jax.ops import _spread

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-compiled",
        action="store_true",
        help="tests marked compiled fail where they would be skipped",
    )


# Of XLA's own products and fusions, no kernels of ours: it would run several of each to
# find the fastest, which no test has any use for.
_NOTHING_TUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def pytest_configure(config: pytest.Config) -> None:
    """What is set before a backend starts; workers and subprocesses inherit it."""
    if hasattr(config, "workerinput"):
        return
    if config.option.markexpr == "gpu":
        os.environ["XLA_FLAGS"] += f" {_NOTHING_TUNED}"
    _share_compilations(config)


def _share_compilations(config: pytest.Config) -> None:
    """What one worker or subprocess compiled, the others load: of this session."""
    if jax.config.jax_compilation_cache_dir:
        return
    folder = tempfile.TemporaryDirectory(prefix="fp8jax-tests-")
    config.add_cleanup(folder.cleanup)
    for name, value in {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def _hopper_missing() -> str | None:
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) == "9.0":
        return None
    return (
        "needs a GPU of compute capability 9.0, found "
        f"{device.platform} ({device.device_kind})"
    )


# Some of every floor: what runs in a minute and a half, for before each commit.
_QUICK = (
    *("numerics", "recipes", "testing", "cli", "transform/passes"),
    *("test_compat.py", "test_dispatch.py", "test_layers.py", "test_lowered_once.py"),
    *("kernels/test_available.py", "quant/test_qtensor.py", "ops/test_spread.py"),
    *("transform/test_report.py", "transform/test_cost.py", "transform/test_tree.py"),
    *("nnx/test_tabulate.py", "checkpoint/test_reader.py"),
)


@pytest.hookimpl(tryfirst=True)  # Before what `-m` leaves out.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(_QUICK):
            item.add_marker("quick")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _hopper_missing() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
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
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
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
