"""The reader against files that the safetensors library wrote, and against lies."""

import json
import os
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fp8jax import checkpoint
from fp8jax.checkpoint import CheckpointError, Reader
from fp8jax.testing import assert_same_bits, random_codes

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
E8M0, BF16 = ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class TestWhatTheirsWrites:
    @pytest.mark.parametrize(
        "dtype", [E4M3, E5M2, E8M0, BF16, np.float16, np.float32, np.int64, np.bool_]
    )
    def test_every_dtype_is_read_bit_for_bit(self, rng, tmp_path, dtype):
        values = rng.integers(0, 2, (3, 5, np.dtype(dtype).itemsize), np.uint8)
        values = values.view(dtype)[..., 0]
        tensors = {"w": values, "w_scale_inv": np.ones((1, 1), np.float32)}
        path = tmp_path / "x.safetensors"
        safetensors.numpy.save_file(tensors, path)
        assert_same_bits(Reader(path).codes("w"), values)

    def test_every_float8_code_is_kept(self, tmp_path):
        codes = np.arange(256, dtype=np.uint8).reshape(16, 16).view(E4M3)
        tensors = {"w": codes, "w_scale_inv": np.ones((1, 1), np.float32)}
        safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
        assert_same_bits(Reader(tmp_path).codes("w"), codes)

    @pytest.mark.parametrize("suffix", ["_scale_inv", "_scale", "_scales_inv"])
    def test_a_ragged_weight_finds_its_scale_by_each_name(self, rng, tmp_path, suffix):
        codes = random_codes(rng, (576, 300))
        scale = rng.random((5, 3), np.float32)
        tensors = {"a.weight": codes, f"a.weight{suffix}": scale}
        safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
        reader = Reader(tmp_path)
        assert list(reader) == ["a.weight"]
        assert reader["a.weight"].tile == (128, 128)
        assert reader["a.weight"].nbytes == 576 * 300 + 15 * 4
        assert_same_bits(reader.codes("a.weight"), codes)
        assert_same_bits(reader.scale("a.weight"), scale)

    @pytest.mark.parametrize("dtype", [E8M0, np.uint8])
    def test_e8m0_scales_are_powers_of_two(self, tmp_path, dtype):
        exponents = np.arange(256, dtype=np.uint8)[:, None]
        tensors = {
            "w": np.zeros((256 * 128, 1), E4M3),
            "w_scale": exponents.view(dtype),
        }
        safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
        scale = Reader(tmp_path).scale("w")[:, 0]
        assert scale.dtype == np.float32
        expected = [2.0 ** (e - 127) for e in range(255)]
        assert scale[:255].tolist() == expected
        assert np.isnan(scale[255])

    def test_scale_may_be_in_another_shard(self, rng, tmp_path):
        codes, scale = random_codes(rng, (128, 256)), rng.random((1, 2), np.float32)
        safetensors.numpy.save_file({"w": codes}, tmp_path / "a.safetensors")
        safetensors.numpy.save_file({"w_scale_inv": scale}, tmp_path / "b.safetensors")
        weight_map = {"w": "a.safetensors", "w_scale_inv": "b.safetensors"}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        reader = Reader(tmp_path)
        assert list(reader) == ["w"]
        assert len(reader.files) == 2
        assert_same_bits(reader.codes("w"), codes)
        assert_same_bits(reader.scale("w"), scale)

    def test_tile_is_the_configured_one(self, tmp_path):
        tensors = {"w": np.zeros((128, 64), E4M3), "w_scale": np.ones((2, 2), "f")}
        safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
        config = {"quantization_config": {"weight_block_size": [64, 32]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert Reader(tmp_path)["w"].tile == (64, 32)

    def test_a_view_survives_the_release_of_its_pages(self, rng, tmp_path):
        codes = rng.integers(0, 255, (300, 300), np.uint8)
        safetensors.numpy.save_file({"w": codes}, tmp_path / "x.safetensors")
        reader = Reader(tmp_path)
        view = reader.codes("w")
        reader.release("w")
        assert_same_bits(view, codes)
        assert not view.flags.writeable


HEADERS = {
    "no JSON": (b"{", "no JSON"),
    "no object": (b"[]", "no JSON object"),
    "not UTF-8": (b'{"\xff": 1}', "no JSON"),
    "deeply nested": (b"{" + b'"a":[' * 100_000, "no JSON"),
    "a lone surrogate": (b'{"\\ud800": {}}', "no JSON"),
    "a huge number": (b'{"w": {"a": ' + b"9" * 10_000 + b"}}", "no JSON"),
    "an entry of another kind": ({"w": 3}, "'w': its entry has other fields"),
    "a field too few": ({"w": {"dtype": "U8", "shape": [4]}}, "'w': its entry"),
    "an unknown dtype past the end": ({"w": entry("F7", offsets=(0, 5))}, "'w': ends"),
    "a dtype that is no name": ({"w": entry({})}, "'w': has dtype"),
    "a negative side": ({"w": entry(shape=(-4,))}, r"'w': has shape \[-4\]"),
    "a side that is a float": ({"w": entry(shape=(4.0,))}, "'w': has shape"),
    "a side that is a bool": ({"w": entry(shape=(True, 4))}, "'w': has shape"),
    "sides past 2^63": ({"w": entry(shape=(2**62, 2**62, 0))}, "'w': has shape"),
    "too high a rank": ({"w": entry(shape=(1,) * 65)}, "'w': has shape"),
    "offsets turned round": ({"w": entry(offsets=(4, 0))}, "'w': has data_offsets"),
    "three offsets": ({"w": entry(offsets=(0, 4, 4))}, "'w': has data_offsets"),
    "too few bytes": ({"w": entry(shape=(5,))}, "'w': U8.* needs 5 bytes"),
    "past the end": ({"w": entry(shape=(5,), offsets=(0, 5))}, "'w': ends at byte"),
    "an overlap": (
        {"v": entry(), "w": entry(shape=(2,), offsets=(2, 4))},
        "'w': overlaps with tensor 'v'",
    ),
    "a gap": ({"w": entry(shape=(2,), offsets=(2, 4))}, "'w': 2 bytes before it"),
    "a rest": ({"w": entry(shape=(3,), offsets=(0, 3))}, "last 1 bytes"),
    "a name twice": (
        b'{"w": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}, "w": {}}',
        "'w': is in the header twice",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": entry()}, "__metadata__"),
}


class TestLies:
    @pytest.mark.parametrize("what", HEADERS)
    def test_a_header_with(self, tmp_path, what):
        header, message = HEADERS[what]
        path = raw_file(tmp_path / "x.safetensors", header, b"\0" * 4)
        with pytest.raises(CheckpointError, match=message) as error:
            Reader(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("size", [0, 7])
    def test_a_file_shorter_than_its_first_field(self, tmp_path, size):
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"\0" * size)
        with pytest.raises(CheckpointError, match=f"{size} bytes"):
            Reader(path)

    @pytest.mark.parametrize("length", [1000, 2**63, 2**64 - 1])
    def test_a_header_longer_than_the_file(self, tmp_path, length):
        path = raw_file(tmp_path / "x.safetensors", {}, length=length)
        with pytest.raises(CheckpointError, match="header is said to have"):
            Reader(path)

    def test_every_truncation_is_noticed(self, tmp_path):
        path = tmp_path / "x.safetensors"
        tensors = {"a": np.arange(9, dtype=np.float32), "b": np.ones(3, np.int8)}
        safetensors.numpy.save_file(tensors, path)
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError):
                Reader(path)

    @pytest.mark.parametrize(
        ("scale", "message"),
        [
            ({}, "'w': is float8_e4m3fn and has no scale"),
            ({"w_scale_inv": np.ones((4, 3), "f")}, r"\(4, 3\); 'w'.*needs \(5, 3\)"),
            ({"w_scale_inv": np.ones((5, 3), "i4")}, "is int32; allowed"),
        ],
    )
    def test_an_fp8_weight_with_a_wrong_scale(self, tmp_path, scale, message):
        tensors = {"w": np.zeros((576, 300), E4M3), **scale}
        path = tmp_path / "x.safetensors"
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message) as error:
            Reader(path)
        assert "x.safetensors" in str(error.value)

    @pytest.mark.parametrize(
        ("weight_map", "message"),
        [
            (None, "no weight_map"),
            ({"w": "b.safetensors"}, "'w': its shard 'b.safetensors' is missing"),
            ({"v": "a.safetensors"}, "'v': is not in it"),
            ({"w": "../a.safetensors"}, "'w': is said to be in file '../a"),
            ({"w": 3}, "'w': is said to be in file 3"),
        ],
    )
    def test_an_index_that_lies(self, tmp_path, weight_map, message):
        safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "a.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            Reader(tmp_path)

    def test_two_files_and_no_index(self, tmp_path):
        for name in "ab":
            raw_file(tmp_path / f"{name}.safetensors", {})
        with pytest.raises(CheckpointError, match=r"no model.*2 \.safetensors files"):
            Reader(tmp_path)

    def test_a_tile_that_is_none(self, tmp_path):
        raw_file(tmp_path / "x.safetensors", {})
        config = {"quantization_config": {"weight_block_size": [0, 128]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"weight_block_size \[0, 128\]"):
            Reader(tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No checkpoint"):
            Reader(tmp_path / "none")


def test_taken_elements_are_those_of_the_file_and_jax_takes_them_uncopied(tmp_path):
    x = np.arange(1000, dtype=np.float32)
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": x[:3], "x": x}, path)
    reader = Reader(path)
    for part in (slice(5, 17), slice(990, 2000), slice(7, 7), slice(None)):
        taken = reader.take("x", part)
        np.testing.assert_array_equal(taken, x[part])
        assert not taken.size or taken.ctypes.data % 64 == 0
    taken = reader.take("x", slice(None))
    assert jax.device_put(taken).unsafe_buffer_pointer() == taken.ctypes.data
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"'x'.*was cut short meanwhile"):
        reader.take("x", slice(None))


TAKEN = {
    "white space in front": b" \n\t" + json.dumps({"w": entry()}).encode(),
    "metadata of null": {"__metadata__": None, "w": entry()},
    "a field that the format may get": {"w": {**entry(), "x": 1}},
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_header_that_others_take_with(tmp_path, what):
    raw_file(tmp_path / "x.safetensors", TAKEN[what], b"\1\2\3\4")
    reader = Reader(tmp_path)
    assert reader.codes("w").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "C64"])
def test_a_tensor_of_an_unknown_dtype_is_refused_when_it_is_asked_for(tmp_path, code):
    header = {"w": entry(code, offsets=(0, 2)), "v": entry(shape=(2,), offsets=(2, 4))}
    raw_file(tmp_path / "x.safetensors", header, b"\1\2\3\4")
    reader = Reader(tmp_path)
    assert list(reader) == ["v"]
    assert reader.others == {"w": f"dtype {code}"}
    assert "w" not in reader
    match = f"'w'.* dtype {code}"
    with pytest.raises(CheckpointError, match=match):
        reader.codes("w")
    with pytest.warns(
        UserWarning, match=rf"leaves out 1 tensors .* w \(dtype {code}\)"
    ):
        params = checkpoint.load(tmp_path)
    assert params["v"].tolist() == [3, 4]
    # What copies or compares all of a checkpoint would lose it.
    for run in (
        lambda: checkpoint.quantize_checkpoint(tmp_path, tmp_path / "out"),
        lambda: checkpoint.dequantize_checkpoint(tmp_path, tmp_path / "out"),
        lambda: checkpoint.diff(tmp_path, tmp_path),
    ):
        with pytest.raises(ValueError, match=match):
            run()


def test_many_names_are_checked_in_linear_time(tmp_path):
    """A quarter of a second; a search of the list for each took minutes."""
    count = 200_000
    header = {f"w{i}": entry("U8", (0,), (0, 0)) for i in range(count)}
    text = json.dumps(header).encode()
    twice = text[:-1] + b', "w199999": {}}'
    path = raw_file(tmp_path / "x.safetensors", twice)
    with pytest.raises(CheckpointError, match="'w199999': is in the header twice"):
        Reader(path)
    assert len(Reader(raw_file(tmp_path / "y.safetensors", text))) == count


def test_more_files_than_a_process_may_have_open(tmp_path):
    resource = pytest.importorskip("resource")
    x = np.ones((128, 128), np.float32)
    params = {f"l.{i}.weight": x for i in range(60)}
    checkpoint.save(tmp_path / "in", params, max_shard_bytes=x.nbytes)
    assert len(Reader(tmp_path / "in").files) == 60
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    busy = max(map(int, os.listdir("/proc/self/fd")))
    # A run writes as many files of its own.
    resource.setrlimit(resource.RLIMIT_NOFILE, (busy + 90, before[1]))
    try:
        checkpoint.quantize_checkpoint(
            tmp_path / "in", tmp_path / "out", max_shard_bytes=1
        )
        loaded = checkpoint.load(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(loaded) == 60


def test_a_file_that_another_took_the_place_of_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(8, np.uint8)}, path)
    reader = Reader(path)
    safetensors.numpy.save_file({"v": np.ones(8, np.uint8)}, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    for read in (reader.codes, lambda name: reader.take(name, slice(None))):
        with pytest.raises(CheckpointError, match="is another file than it was"):
            read("w")


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"0 \.safetensors files"):
        Reader(tmp_path)
    with pytest.raises(FileNotFoundError, match="No checkpoint"):
        Reader(tmp_path / "x.safetensors")


@pytest.mark.parametrize("names", [("a.weight", "a.weight.b"), ("a.b", "a.b.c.d")])
@pytest.mark.parametrize("turned", [False, True])
def test_a_name_within_another_is_refused_in_a_nested_tree(tmp_path, names, turned):
    names = names[::-1] if turned else names
    x = np.ones((2, 2, 2), np.float32)  # Of no other name in Flax's layout.
    raw = json.dumps(
        {n: entry("F32", x.shape, (32 * i, 32 * i + 32)) for i, n in enumerate(names)}
    )
    raw_file(tmp_path / "x.safetensors", raw.encode(), x.tobytes() * 2)
    with pytest.raises(CheckpointError, match=rf"'{names[1]}': has the place of"):
        checkpoint.load(tmp_path, layout="flax")
    assert sorted(checkpoint.load(tmp_path)) == sorted(names)
