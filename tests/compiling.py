"""What XLA compiles for tests: with what effort, and what workers share of it."""

import functools
import os
import pathlib
import tempfile
from typing import Any

import jax
import pytest
from jax._src import compiler

# Where a quantization's or a product's numbers are held to an oracle, and FP8 steps to
# the bits of another program, XLA:CPU compiles as it does for users. Elsewhere LLVM
# saves its effort, a third to a half of a test's time. XLA's passes, fusion and all,
# are the same, and programs that are compared with each other are compiled alike; of
# numbers only LLVM's contraction is missing, of a multiplication and an addition to one
# rounding.
OPTIMIZED = (
    *("numerics", "quant", "matmul", "test_parity.py", "transform/test_bits.py"),
    *("ops/test_dot_general.py", "ops/test_dtypes.py", "ops/test_einsum.py"),
    *("ops/test_ragged_dot.py", "ops/test_rms_norm_dot.py", "ops/test_swiglu.py"),
)
# Not these of them: dtypes, and our own operations, compiled alike, beside each other.
_ALIKE = (
    "quant/test_quantize.py::test_batch_dimensions_are_matrices",
    "quant/test_quantize.py::test_both_directions_are_the_two",
    "quant/test_fused.py::test_batches_are_matrices",
    "ops/test_dot_general.py::test_jit_remat_scan_and_vmap",
    "ops/test_dot_general.py::test_preferred_element_type",
    "ops/test_dtypes.py::test_gradients_have_the_dtypes",
    "ops/test_ragged_dot.py::test_expert_mlp_is_three_products",
    "ops/test_ragged_dot.py::test_sizes_are_data",
    "ops/test_rms_norm_dot.py::test_fused_is_the_norm_and",
    "ops/test_swiglu.py::test_fused_is_the_unfused_block",
)


def _is_optimized(item: pytest.Item) -> bool:
    for_gpus = any(map(item.get_closest_marker, ("gpu", "compiled")))
    if for_gpus or item.config.getoption("optimized"):
        return True
    return lies_in(item, OPTIMIZED) and not lies_in(item, _ALIKE)


_OPTION = "jax_disable_most_optimizations"


def prepare(item: pytest.Item) -> None:
    """For a test and the subprocesses that it starts."""
    saves_effort = not _is_optimized(item)
    os.environ[_OPTION.upper()] = str(saves_effort)
    if jax.config.read(_OPTION) != saves_effort:
        jax.config.update(_OPTION, saves_effort)
        jax.clear_caches()  # Which do not know that option.


# Single tests of half a minute: none of them is the last that all others wait for.
_LONG = "examples", "processes", "test_on_gpu.py", "tune", "kernels/test_gemm_trust.py"


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """The long ones first, and those that are compiled alike together.

    Between the two kinds caches are cleared.
    """
    return sorted(items, key=lambda i: (not lies_in(i, _LONG), _is_optimized(i)))


def emit_fusions_as_before() -> None:
    """JAX 0.10's XLA:CPU, where effort is saved, without its emitters through MLIR.

    They take half of a compilation. Later ones have no others.
    """
    options = compiler.get_compile_options

    def of_tests(*args: Any, env_options_overrides: Any = None, **others: Any) -> Any:
        overrides = dict(env_options_overrides or {})
        if jax.config.read(_OPTION):
            overrides.setdefault("xla_cpu_use_fusion_emitters", False)
        return options(*args, env_options_overrides=overrides, **others)

    if jax.__version_info__ < (0, 11):
        compiler.get_compile_options = of_tests


def lies_in(item: pytest.Item, places: tuple[str, ...]) -> bool:
    """Whether a place, the beginning of a path or of `path::test`, is the test's."""
    return f"{_path(item.path)}::{item.name}".startswith(places)


@functools.cache
def _path(path: pathlib.Path) -> str:
    return path.relative_to(pathlib.Path(__file__).parent).as_posix()


def share(config: pytest.Config) -> None:
    """What one worker or subprocess compiled, the others load: of this run.

    And of the next, if the environment names a folder that stays.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        made = tempfile.TemporaryDirectory(prefix="fp8jax-tests-")
        config.add_cleanup(made.cleanup)
        folder = made.name
    for name, value in {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def tune_nothing() -> None:
    """On a GPU, XLA would run several of each of its products to find the fastest."""
    os.environ["XLA_FLAGS"] += (
        " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )
