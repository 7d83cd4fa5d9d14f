"""Programs compiled by XLA:GPU for H100s, with no GPU and no driver.

Needs the CUDA plugin's wheels beside JAX (`pip install -e ".[compiled]"`), and, where
there is no driver, `JAX_PLATFORMS=cpu` before JAX is imported: the plugin would refuse
to start as a platform.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from fp8jax import _dispatch
from fp8jax.ops import _spread

_DESCRIPTION = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_address_bits: 64
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def devices(count: int) -> tuple[Any, ...]:
    """That many H100s of one host, to compile for.

    Raises:
        RuntimeError: If this JAX cannot compile for them; it says why.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_DESCRIPTION, topology=f"1x1x{count}"
        )
    except Exception as error:  # The plugin's and JAX's own kinds differ by version.
        raise RuntimeError(
            "cannot compile for H100s here: it takes the CUDA plugin's wheels beside "
            'JAX, pip install -e ".[compiled]", and JAX_PLATFORMS=cpu where there is '
            f"no driver. {type(error).__name__}: {str(error)[:200]}"
        ) from error
    return tuple(topology.devices)


def mesh(count: int) -> Mesh:
    """Those devices along one axis `"x"`, sharded automatically."""
    axis = (AxisType.Auto,)
    return Mesh(np.array(devices(count)), ("x",), axis_types=axis)


@contextlib.contextmanager
def as_where_they_are(count: int) -> Iterator[None]:
    """Kernels are chosen as in a process that has that many H100s.

    What JAX traced before or in here is forgotten: a trace keeps the choice of kernels.
    """
    chosen = mock.patch.object(_dispatch, "check_available", return_value=None)
    alone = mock.patch.object(_spread, "_is_only_device", return_value=count == 1)
    jax.clear_caches()
    try:
        with chosen, alone:
            yield
    finally:
        jax.clear_caches()


def compiled(function: Any, *args: Any) -> str:
    """The scheduled HLO of a jitted function, for the devices that `args` name.

    Args:
        function: has `.lower`, as what `jax.jit` and `fp8_transform` give.
        *args: trees of `jax.ShapeDtypeStruct` with shardings on `mesh(count)`.
    """
    count = max(len(x.sharding.device_set) for x in jax.tree.leaves(args))
    with as_where_they_are(count):
        text = function.lower(*args).compile(compiler_options=OPTIONS).as_text()
    assert text is not None
    return text


# Nothing can be timed here. What LLVM makes of a fusion does not show in HLO.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 0}
