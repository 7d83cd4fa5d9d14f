"""Mutates safetensors files and holds the reader to the safetensors library.

    python tests/checkpoint/fuzz.py --mutations 10000 --seed 0

A mutated file is refused with a CheckpointError, or read as `safetensors.deserialize`,
written by others in another language, reads it: the same names, shapes, dtypes, bytes.
"""

import argparse
import collections
import json
import pathlib
import random
import struct
import tempfile
import time

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from fp8jax.checkpoint import CheckpointError, Reader

SECONDS_ALLOWED = 2.0  # For a file of some kilobytes: a hang, not a busy machine.
_VALUES = (0, 1, -1, 2, 4, 127, 128, 300, 2**31, 2**32, 2**63, 2**64, 10**30, 1.5, "8")
_DTYPES = ("U8", "F32", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "F4", "", None)


def original() -> bytes:
    """A file with FP8 weights, ragged and batched, scales of both kinds, and others."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 255, (3, 20, 40), np.uint8)
    return safetensors.numpy.save(
        {
            "a.weight": codes[0].view(ml_dtypes.float8_e4m3fn),
            "a.weight_scale_inv": rng.random((1, 1), np.float32),
            "b.weight": codes.view(ml_dtypes.float8_e5m2),
            "b.weight_scale": codes[:, :1, :1].view(ml_dtypes.float8_e8m0fnu),
            "norm.weight": rng.random(40, np.float32).astype(ml_dtypes.bfloat16),
            "steps": np.arange(5),
            "empty": np.zeros((0, 3), np.float16),
        },
        metadata={"format": "np"},
    )


def _flip_bits(rng: random.Random, data: bytearray) -> None:
    length = struct.unpack_from("<Q", data)[0]
    end = 8 + length if rng.random() < 0.9 else len(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)


def _other_bytes(rng: random.Random, data: bytearray) -> None:
    length = struct.unpack_from("<Q", data)[0]
    start = rng.randrange(8 + length)
    for i in range(start, min(start + rng.randrange(1, 9), 8 + length)):
        data[i] = rng.choice(b'0123456789{}[],:"\\\xff\x00 ')


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _extend(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.randrange(1, 64))


def _cut_out(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 64)]


def _header_size(rng: random.Random, data: bytearray) -> None:
    length = struct.unpack_from("<Q", data)[0]
    other = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64))
    struct.pack_into("<Q", data, 0, min(other, 2**64 - 1))


def _header_field(rng: random.Random, data: bytearray) -> None:
    """Another value in a header that stays JSON: the checks behind the parser."""
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([x for x in header if x != "__metadata__"])
    kind = rng.choice(("dtype", "shape", "data_offsets", "rename", "drop", "swap"))
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(_DTYPES)
    elif kind == "rename":
        header[rng.choice(("x", "a.weight_scale", "", "__metadata__"))] = header.pop(
            name
        )
    elif kind == "drop":
        del header[name]
    elif kind == "swap":
        other = rng.choice([x for x in header if x != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:
        values = header[name][kind]
        header[name][kind] = rng.choice(
            (
                values[::-1],
                values[:-1],
                [*values, 1],
                [rng.choice(_VALUES) for _ in values],
                [v if i else rng.choice(_VALUES) for i, v in enumerate(values)],
                rng.choice(_VALUES),
            )
        )
    text = json.dumps(header).encode()
    data[: 8 + length] = struct.pack("<Q", len(text)) + text


MUTATIONS = (
    _flip_bits,
    _other_bytes,
    _truncate,
    _extend,
    _cut_out,
    _header_size,
    _header_field,
    _header_field,
)


def check(path: pathlib.Path, data: bytes) -> str:
    """How the reader took the file: `"refused"` or `"read"`.

    Raises:
        AssertionError: If it was read, and not as the safetensors library reads it.
    """
    path.write_bytes(data)
    try:
        reader = Reader(path)
    except CheckpointError as error:
        if str(path) not in str(error):
            raise
        return "refused"
    if reader.others:  # Refused when they are asked for; the library may not know them.
        return "refused"
    theirs = dict(safetensors.deserialize(data))
    ours = {}
    for name, weight in reader.items():
        ours[name] = reader.codes(name)
        if weight.scale is not None:
            assert reader.scale(name).dtype == np.float32
            ours[weight.scale_name] = None
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if value is None:
            continue
        assert list(value.shape) == theirs[name]["shape"]
        assert value.tobytes() == bytes(theirs[name]["data"])
        code = reader[name].stored.dtype
        assert _CODES[theirs[name]["dtype"]] == code
    return "read"


# As the library's own table has them, not ours.
_CODES = {
    "U8": np.uint8,
    "I8": np.int8,
    "BOOL": np.bool_,
    "I16": np.int16,
    "U16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "U64": np.uint64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def run(folder: pathlib.Path, mutations: int, seed: int) -> collections.Counter:
    """Counts of outcomes, by mutation; the file that failed stays in `folder`."""
    rng, start = random.Random(seed), original()
    path, counts = folder / "mutated.safetensors", collections.Counter()
    assert check(path, start) == "read"
    for _ in range(mutations):
        data, mutate = bytearray(start), rng.choice(MUTATIONS)
        mutate(rng, data)
        began = time.perf_counter()
        outcome = check(path, bytes(data))
        assert time.perf_counter() - began < SECONDS_ALLOWED
        counts[mutate.__name__.strip("_"), outcome] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(pathlib.Path(folder), options.mutations, options.seed)
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:14} {outcome:8} {count:6}")
    print(f"{counts.total()} mutated files: no crash, no hang, no wrong tensor")


if __name__ == "__main__":
    main()
