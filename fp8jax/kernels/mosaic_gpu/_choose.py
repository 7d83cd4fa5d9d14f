"""The config of a GEMM: from the loaded table, or computed from the shape.

The loaded table is the one thing in this library that a process holds besides JAX's own
caches. It may change how long a product takes, never its bits.
"""

import os

import jax

from fp8jax.kernels.mosaic_gpu._common import num_sms
from fp8jax.kernels.mosaic_gpu._config import COMPUTED, GemmConfig
from fp8jax.kernels.mosaic_gpu._problem import GemmKind, GemmProblem
from fp8jax.kernels.mosaic_gpu._table import Entry, Table, read_table

_loaded: Table | None = None


def computed_config(
    kind: GemmKind, m: int, n: int, k: int, out_dtype: str, num_sms: int
) -> GemmConfig:
    """The config that follows from the shape alone."""
    del out_dtype  # NOTE: no shape's config depends on it yet.
    return COMPUTED[kind](m, n, k, num_sms)


def choose_config(
    kind: GemmKind, m: int, n: int, k: int, out_dtype: str, num_sms: int
) -> GemmConfig:
    """The config that the kernel runs with: measured, if a table knows the problem.

    Args:
        kind: "1d2d" or "1d1d".
        m, n, k: sides.
        out_dtype: name of the dtype that the kernel stores, "bfloat16" or "float32".
        num_sms: multiprocessors to fill.
    """
    entry = measured_entry(GemmProblem(kind, m, n, k, out_dtype), num_sms)
    if entry is not None:
        return entry.config
    return computed_config(kind, m, n, k, out_dtype, num_sms)


def measured_entry(problem: GemmProblem, num_sms: int) -> Entry | None:
    """The loaded table's entry for a problem on a GPU of this size, if it has one."""
    if _loaded is None or _loaded.num_sms != num_sms:
        return None
    return _loaded.entries.get(problem.key)


def present_device_kind() -> str:
    """The GPU's name, as JAX gives it."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return "no GPU"


def load_tuning(path: str | os.PathLike[str] | None) -> None:
    """Takes GEMM configs from a table that `python -m fp8jax.tune` measured.

    It replaces the table loaded before; problems that it does not know keep the config
    that is computed from their shape. Results stay the same bits.

    A config is chosen while a function is traced, so `load_tuning` drops every traced
    and compiled function of the process (`jax.clear_caches`): call it first, before
    anything is compiled. What `.lower(...).compile()` returned stays as it is.

    Args:
        path: the JSON file, or None to forget the loaded table.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the table is of another GPU, of other kernels or of another
            schema, or holds a config that the kernel cannot run. The table loaded
            before stays.
    """
    global _loaded
    new = (
        None
        if path is None
        else read_table(path, device_kind=present_device_kind(), num_sms=num_sms())
    )
    if new != _loaded:
        _loaded = new
        jax.clear_caches()
