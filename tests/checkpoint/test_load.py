"""`load`: the file's bits on the devices, in either orientation."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import fp8jax
from fp8jax import checkpoint
from fp8jax.testing import assert_same_bits, distinct_scales, random_codes

P = PartitionSpec


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": rng.random((50, 8), np.float32),
        "model.layers.0.up.weight": random_codes(rng, (576, 300)),
        "model.layers.0.up.weight_scale_inv": distinct_scales(rng, (5, 3)),
        "model.layers.0.up.bias": rng.random(576, np.float32),
        "model.norm.weight": rng.random(8, np.float32).astype(ml_dtypes.bfloat16),
        "steps": np.asarray([1, -(2**31)]),
    }


@pytest.fixture
def path(tensors, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


UP = "model.layers.0.up.weight"


def test_hf_layout_has_the_names_and_bits_of_the_file(path, tensors):
    params = checkpoint.load(path)
    assert set(params) == {n for n in tensors if not n.endswith("_scale_inv")}
    q = params[UP]
    q.check("test")
    assert q.tile == (128, 128)
    assert_same_bits((q.data, q.scale), (tensors[UP], tensors[f"{UP}_scale_inv"]))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert_same_bits(params[name], tensors[name])
    assert params["steps"].tolist() == [1, -(2**31)]


def test_flax_layout_is_transposed_exactly(path, tensors):
    model = checkpoint.load(path, layout="flax")["model"]
    kernel = model["layers"]["0"]["up"]["kernel"]
    kernel.check("test")
    assert kernel.shape == (300, 576)
    assert_same_bits(kernel.data, np.ascontiguousarray(tensors[UP].T))
    assert_same_bits(kernel.scale, np.ascontiguousarray(tensors[f"{UP}_scale_inv"].T))
    hf = checkpoint.load(path)[UP]
    chex.assert_trees_all_equal(kernel.dequantize(), hf.dequantize().T)
    assert model["embed_tokens"]["embedding"].shape == (50, 8)
    assert set(model["norm"]) == {"scale"}


def test_flax_kernels_lie_in_memory_as_in_the_file(path):
    params = checkpoint.load(path, layout="flax")
    kernel = params["model"]["layers"]["0"]["up"]["kernel"]
    plain = checkpoint.quantize_params({"kernel": jnp.ones((128, 256))})["kernel"]
    for q in (kernel, plain):
        for x in (q.data, q.scale):
            assert x.format.layout.major_to_minor == (1, 0)


def test_what_was_loaded_outlives_the_file(path, tensors):
    params = checkpoint.load(path)
    (path / "model.safetensors").write_bytes(b"")
    assert_same_bits(params[UP].data, tensors[UP])


def test_64_bits_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"steps": np.asarray([2**31])}, file)
    with pytest.raises(checkpoint.CheckpointError, match="'steps': has int64 values"):
        checkpoint.load(file)


def test_a_name_of_flax_in_the_file_is_refused_only_there(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a.kernel": np.ones(2, "f")}, file)
    assert set(checkpoint.load(file)) == {"a.kernel"}
    with pytest.raises(ValueError, match=r"'a\.kernel' is called as Flax's"):
        checkpoint.load(file, layout="flax")


def test_an_unknown_layout_is_refused(path):
    with pytest.raises(ValueError, match="load takes layout 'hf' or 'flax', got 'jax'"):
        checkpoint.load(path, layout="jax")


class TestSharding:
    @pytest.fixture
    def mesh(self):
        return Mesh(np.asarray(jax.devices()).reshape(2, 4), ("x", "y"))

    @pytest.fixture
    def weight(self, tmp_path):
        rng = np.random.default_rng(1)
        tensors = {
            "w": random_codes(rng, (512, 256)),
            "w_scale_inv": distinct_scales(rng, (4, 2)),
        }
        safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
        return tmp_path, tensors

    @pytest.mark.parametrize(
        ("spec", "scale_spec"),
        [
            (P("x", None), P("x", None)),
            (P("y", "x"), P("y", "x")),
            (P("y"), P("y", None)),
            (P(None, "y"), P(None, None)),  # A shard of 64 holds half a tile.
            (P(("x", "y"), None), P(None, None)),
            (P(), P(None, None)),
        ],
    )
    def test_codes_and_scales_lie_where_asked(self, weight, mesh, spec, scale_spec):
        path, tensors = weight
        sharding = NamedSharding(mesh, spec)
        q = checkpoint.load(path, sharding=sharding)["w"]
        assert q.data.sharding == sharding
        assert q.scale.sharding == NamedSharding(mesh, scale_spec)
        assert_same_bits((q.data, q.scale), (tensors["w"], tensors["w_scale_inv"]))

    def test_function_of_the_name_and_shape_decides(self, path, mesh):
        seen = {}

        def sharding(name, aval):
            seen[name] = (aval.shape, aval.dtype)
            rows = NamedSharding(mesh, P("y", None))
            return rows if name == UP else None

        params = checkpoint.load(path, layout="flax", sharding=sharding)
        kernel = params["model"]["layers"]["0"]["up"]["kernel"]
        assert seen[UP] == ((300, 576), jnp.float8_e4m3fn)  # As it is here.
        assert kernel.data.sharding.spec == P("y", None)
        assert kernel.scale.sharding.is_fully_replicated

    def test_a_device_is_given_only_its_rows_of_the_file(
        self, weight, mesh, monkeypatch
    ):
        path, tensors = weight
        touched = []

        class Recorded(np.ndarray):
            def __getitem__(self, index):
                touched.append(index)
                return super().__getitem__(index)

        codes = checkpoint.Reader.codes
        monkeypatch.setattr(
            checkpoint.Reader, "codes", lambda *a: codes(*a).view(Recorded)
        )
        q = checkpoint.load(path, sharding=NamedSharding(mesh, P(("x", "y"))))["w"]
        rows = sorted(index[0].indices(512)[:2] for index in touched)
        assert rows == [(64 * i, 64 * i + 64) for i in range(8)]
        assert_same_bits(q.data, tensors["w"])

    def test_single_device(self, weight):
        device = jax.devices()[3]
        q = checkpoint.load(weight[0], sharding=SingleDeviceSharding(device))["w"]
        assert q.data.devices() == q.scale.devices() == {device}

    def test_loaded_shards_multiply(self, weight, mesh):
        q = checkpoint.load(weight[0], sharding=NamedSharding(mesh, P("y", "x")))["w"]
        values = jax.jit(lambda q: q.dequantize())(q)
        plain = checkpoint.load(weight[0])["w"]
        chex.assert_trees_all_equal(np.asarray(values), np.asarray(plain.dequantize()))
        assert isinstance(q, fp8jax.QTensor)
