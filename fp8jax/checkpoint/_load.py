"""Checkpoints to JAX: codes and scales as they are stored, onto the devices asked for.

Invariant: no FP8 weight is inflated, on the host or on a device.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fp8jax import numerics
from fp8jax.checkpoint._error import CheckpointError
from fp8jax.checkpoint._layout import Layout, check_layout, to_flax
from fp8jax.checkpoint._reader import Reader, Weight
from fp8jax.quant import QTensor, contraction_minor

ShardingOf = Callable[[str, jax.ShapeDtypeStruct], Sharding | None]


def load(
    path: str | os.PathLike,
    *,
    layout: Layout = "hf",
    sharding: Sharding | ShardingOf | None = None,
    tile: numerics.Tile | None = None,
) -> dict[str, Any]:
    """A safetensors checkpoint as JAX arrays, FP8 weights as QTensors.

    Args:
        path: as in `Reader`.
        layout: `"hf"`: a flat table by the names in the file, weights `[out, in]`.
            `"flax"`: nested tables, `weight [out, in]` as `kernel [in, out]` (codes,
            scales and tile transposed, exactly; codes lie in memory as in the file:
            `quant.contraction_minor`), embeddings as `embedding`, vectors called
            `weight` as `scale`.
        sharding: of every array, or a function of its name in the file and its shape
            and dtype here; None is the default device. A shard is read from the file's
            mapped pages, and no others are. A QTensor's scales are sharded as its codes
            are, but for sides where a shard would hold part of a tile: replicated.
        tile: as in `Reader`.

    Returns:
        A pytree of QTensors and arrays. Scales are float32, whatever the file's dtype,
        those of rows or whole matrices repeated over tiles of 128. What is in
        `Reader.others` is left out, with a warning.
        64-bit numbers become 32-bit ones unless JAX has x64 enabled.

    Raises:
        CheckpointError: As `Reader` does, if a 64-bit value does not fit 32 bits, or if
            a name in a nested tree is within another.
        ValueError: If the layout is unknown, or a sharding does not fit.
        OSError: If a file cannot be read.

    Source: DeepSeek-V3's README_WEIGHTS.md, "FP8 Weight Documentation".
    """
    check_layout("load", layout)
    reader = Reader(path, tile=tile)
    if reader.others:
        some = ", ".join(
            f"{n} ({kind})" for n, kind in sorted(reader.others.items())[:3]
        )
        warnings.warn(
            f"load leaves out {len(reader.others)} tensors of {reader.path} that are "
            f"parts of weights in other formats, all named in Reader.others: {some}.",
            stacklevel=2,
        )
    tree: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    for name, weight in reader.items():
        where, transposed = (name,), False
        if layout == "flax":
            where, transposed = to_flax(name, len(weight.stored.shape))
        places.setdefault(where, name)
        *tables, leaf = where
        branch = tree
        for i, table in enumerate(tables, 1):
            if where[:i] in places:
                raise _within(reader, name, places[where[:i]])
            branch = branch.setdefault(table, {})
        if leaf in branch:
            other = next(n for w, n in places.items() if w[: len(where)] == where)
            raise _within(reader, name, other)
        branch[leaf] = _load_weight(reader, weight, transposed, sharding)
        reader.release(name)
    return tree


def _within(reader: Reader, name: str, other: str) -> CheckpointError:
    return CheckpointError(
        reader[name].stored.path,
        f"has the place of {other!r} in a nested tree, or one in or around it: take "
        "layout='hf'.",
        name,
    )


def _load_weight(
    reader: Reader,
    weight: Weight,
    transposed: bool,
    sharding: Sharding | ShardingOf | None,
) -> jax.Array | QTensor:
    values = _fitting(weight, reader.codes(weight.name))
    values = values.T if transposed else values
    if callable(sharding) and not isinstance(sharding, Sharding):
        aval = jax.ShapeDtypeStruct(values.shape, values.dtype)
        sharding = sharding(weight.name, aval)
    data = _place(values, sharding)
    if weight.tile is None:
        return data
    scale, tile = reader.scale(weight.name), weight.tile
    if transposed:
        scale, tile = scale.T, (tile[1], tile[0])
    q = QTensor(data, _place(scale, scale_sharding(sharding, data, tile)), tile)
    return contraction_minor(q) if transposed else q


def _fitting(weight: Weight, values: np.ndarray) -> np.ndarray:
    """64-bit numbers in the 32 bits that JAX keeps, where that changes none."""
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if dtype == values.dtype:
        return values
    with np.errstate(over="ignore"):
        fitting = values.astype(dtype)
    if not np.array_equal(fitting.astype(values.dtype), values, equal_nan=True):
        raise CheckpointError(
            weight.stored.path,
            f"has {values.dtype} values beyond {dtype}: enable jax_enable_x64.",
            weight.name,
        )
    return fitting


def _place(values: np.ndarray, sharding: Any) -> jax.Array:
    # Copies, because a JAX array on a CPU may go on living in what it was made from.
    if sharding is None:
        return jnp.asarray(np.array(values))
    return jax.make_array_from_callback(
        values.shape, sharding, lambda index: np.array(values[index])
    )


def scale_sharding(sharding: Any, data: jax.Array, tile: numerics.Tile) -> Any:
    """The sharding of the scales of codes that are sharded by `sharding`.

    Raises:
        ValueError: If `sharding` is of a kind whose sides cannot be told apart.
    """
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            "load takes a NamedSharding or SingleDeviceSharding for a QTensor, got "
            f"{sharding}."
        )
    spec = [*sharding.spec, *[None] * (data.ndim - len(sharding.spec))]
    local = sharding.shard_shape(data.shape)
    for side in (-2, -1):
        if local[side] != data.shape[side] and local[side] % tile[side]:
            spec[side] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
