"""JAX to checkpoints that transformers, vLLM and this library load."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fp8jax.checkpoint._config import ScaleFormat, quantization_config, write_config
from fp8jax.checkpoint._dtypes import E8M0, TO_CODE, scale_to_e8m0
from fp8jax.checkpoint._families import is_matrix, modules_kept
from fp8jax.checkpoint._layout import Layout, check_layout, from_flax
from fp8jax.checkpoint._publish import replaced_folder
from fp8jax.checkpoint._write import ShardWriter, Specs, split_shards
from fp8jax.quant import QTensor

SCALE_SUFFIX = "_scale_inv"
MAX_SHARD_BYTES = 5 * 10**9


def save(
    path: str | os.PathLike,
    params: Any,
    *,
    layout: Layout = "hf",
    config: Mapping[str, Any] | None = None,
    scale: ScaleFormat = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder of safetensors files, their index and `config.json`.

    A QTensor `w` is stored as its codes `w` and its scales `w_scale_inv`. The folder
    appears, or takes the place of the one before, at once: a save that is killed leaves
    the old files whole. Other files of that folder stay. Arrays come to the host one
    after another.

    Args:
        path: the folder.
        params: a pytree of QTensors and arrays; nested keys are joined with dots.
        layout: what `params` is, as in `load`; the files are in Hugging Face's.
        config: what else `config.json` holds, `quantization_config` apart.
        scale: `"fp32"`, or `"ue8m0"` for scales that are powers of two.
        max_shard_bytes: of a file.

    Raises:
        ValueError: If leaves have one name, are no arrays or spread over several
            processes, QTensors differ in tile or format, or a scale is no power of two
            where `scale="ue8m0"`.
        OSError: If a file cannot be written.
    """
    check_layout("save", layout)
    if scale not in ("fp32", "ue8m0"):
        raise ValueError(f"save takes scale 'fp32' or 'ue8m0', got {scale!r}.")
    leaves = _named(params, layout)
    quantized = {n: q for n, q in leaves.items() if isinstance(q, QTensor)}
    kinds = {(q.tile, np.dtype(q.dtype)) for q in quantized.values()}
    if len(kinds) > 1:
        raise ValueError(
            "save takes QTensors of one tile and format, as config.json has one entry "
            f"for them all, got {sorted(map(str, kinds))}."
        )
    quantization = None
    if kinds:
        ((tile, dtype),) = kinds
        kept = (n for n, x in leaves.items() if n not in quantized)
        kept = (n for n in kept if is_matrix(n, leaves[n].ndim))
        modules = modules_kept(kept, leaves, config or {})
        quantization = quantization_config(dtype, tile, scale, modules)
    shards = split_shards(
        (_specs(n, x, scale) for n, x in leaves.items()), max_shard_bytes
    )
    with replaced_folder(os.fspath(path)) as staging:
        with ShardWriter(staging, shards) as writer:
            for name, x in leaves.items():
                _write(writer, name, x, scale)
        write_config(staging, config or {}, quantization)


def _named(params: Any, layout: Layout) -> dict[str, Any]:
    """Leaves by their names in the file, in Hugging Face's orientation."""
    leaves: dict[str, Any] = {}
    pairs = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, QTensor))
    for path, x in pairs:
        keys = tuple(jax.tree_util.keystr((k,), simple=True) for k in path)
        name, transposed = ".".join(keys), False
        if layout == "flax":
            name, transposed = from_flax(keys)
        x = _checked(name, x)
        if name in leaves:
            raise ValueError(f"save got two leaves called {name!r}.")
        leaves[name] = x.T if transposed else x
    for name, x in leaves.items():
        if isinstance(x, QTensor) and name + SCALE_SUFFIX in leaves:
            raise ValueError(f"save got two leaves called {name + SCALE_SUFFIX!r}.")
    return leaves


def _checked(name: str, x: Any) -> Any:
    if isinstance(x, QTensor):
        x.check(f"save of {name!r}")
    for array in jax.tree.leaves(x):
        if not isinstance(array, jax.Array | np.ndarray | np.generic):
            raise ValueError(f"save takes arrays, got {type(array)} for {name!r}.")
        if np.dtype(array.dtype) not in TO_CODE:
            raise ValueError(
                f"save got {array.dtype} for {name!r}; allowed: "
                f"{', '.join(map(str, TO_CODE))}."
            )
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(
                f"save takes arrays of this process's devices, got {name!r} with "
                f"{array.sharding}: gather it first."
            )
    return x


def _specs(name: str, x: Any, scale: ScaleFormat) -> Specs:
    if not isinstance(x, QTensor):
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype)}
    dtype = E8M0 if scale == "ue8m0" else np.float32
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype),
        name + SCALE_SUFFIX: jax.ShapeDtypeStruct(x.scale.shape, dtype),
    }


def _write(writer: ShardWriter, name: str, x: Any, scale: ScaleFormat) -> None:
    if not isinstance(x, QTensor):
        writer.write(name, np.asarray(x))
        return
    scales = np.asarray(x.scale)
    writer.write(name, np.asarray(x.data))
    writer.write(
        name + SCALE_SUFFIX,
        scale_to_e8m0(scales, name) if scale == "ue8m0" else scales,
    )
