"""Kinds of scales that are published: blocks, output channels, whole matrices.

Names, shapes and config entries are those of the families' files; the numbers are
random. Values are held to NumPy's `codes * scale`.
"""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import fp8jax
from fp8jax import checkpoint
from fp8jax.checkpoint import CheckpointError, Reader
from fp8jax.testing import random_codes

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
M, K = 256, 384
LAYER = "model.layers.0.self_attn.o_proj"


def positive(shape, dtype=np.float32):
    return np.random.default_rng(1).uniform(0.5, 2, shape).astype(dtype)


def compressed(strategy):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


# Names of the weight and of its scale, the scale, quantization_config, and the tile.
FAMILIES = {
    "DeepSeek-V4": ("weight", "scale", positive((2, 3)), {"fmt": "e4m3"}, (128, 128)),
    "FP8_DYNAMIC": (
        "weight",
        "weight_scale",
        positive((M, 1), BF16),
        compressed("channel"),
        (1, 128),
    ),
    "fbgemm": (
        "weight",
        "weight_scale",
        positive((M, 1)),
        {"quant_method": "fbgemm_fp8"},
        (1, 128),
    ),
    "channels as a vector": ("weight", "weight_scale", positive((M,)), {}, (1, 128)),
    "AutoFP8": (
        "weight",
        "weight_scale",
        positive((1,)),
        {"quant_method": "fp8", "activation_scheme": "static"},
        (128, 128),
    ),
    "ModelOpt": ("weight", "weight_scale", positive(()), {}, (128, 128)),
    "Mistral's own": ("weight", "qscale_weight", positive(()), {}, (128, 128)),
}


def numpy_values(codes, scale):
    """`codes * scale`, each scale for an even share of both sides."""
    scale = np.asarray(scale, np.float32)
    scale = scale.reshape(*scale.shape, *[1] * (2 - scale.ndim))
    if scale.shape not in ((1, 1), (M, 1)):
        scale = np.repeat(np.repeat(scale, 128, 0), 128, 1)
    return codes.astype(np.float32) * scale


def written(folder, family):
    weight, scale_name, scale, quantization, _ = FAMILIES[family]
    folder.mkdir()
    codes = random_codes(np.random.default_rng(0), (M, K), E4M3)
    tensors = {f"{LAYER}.{weight}": codes, f"{LAYER}.{scale_name}": scale}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return codes, scale


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    name = request.param
    codes, scale = written(tmp_path / "in", name)
    return tmp_path / "in", numpy_values(codes, scale), FAMILIES[name][-1]


def test_loads_with_its_values(family):
    folder, values, tile = family
    (q,) = checkpoint.load(folder).values()
    assert q.tile == tile
    np.testing.assert_array_equal(q.dequantize(jnp.float32), values)
    turned = checkpoint.load(folder, layout="flax")
    kernel = turned["model"]["layers"]["0"]["self_attn"]["o_proj"]["kernel"]
    np.testing.assert_array_equal(kernel.dequantize(jnp.float32), values.T)


def test_is_dequantized_on_disk_and_compared_by_value(family, tmp_path):
    folder, values, _ = family
    out = tmp_path / "out"
    checkpoint.dequantize_checkpoint(folder, out, dtype="float32")
    np.testing.assert_array_equal(Reader(out).codes(f"{LAYER}.weight"), values)
    (difference,) = checkpoint.diff(folder, out)
    assert difference.what == "same values"
    assert "quantization_config" not in Reader(out).config


def test_layers_and_transformed_functions_multiply_by_its_codes(family):
    folder, values, _ = family
    x = np.random.default_rng(2).standard_normal((32, K)).astype(BF16)
    # Activations are rounded to 2^-4 of themselves, each independently of K others; the
    # result to bfloat16. Five deviations of 8192 sums.
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    deviation = 2.0**-4 * np.sqrt((x.astype("f8") ** 2) @ (values.T.astype("f8") ** 2))
    room = 5 * deviation + 2.0**-8 * np.abs(exact)
    (weight,) = checkpoint.load(folder).values()
    multiply = fp8jax.fp8_transform(lambda w, x: x @ w.T)
    assert multiply.report(weight, x).fraction == 1
    got = np.asarray(multiply(weight, x))
    assert (np.abs(got.astype(np.float64) - exact) <= room).all()
    kernel = checkpoint.load(folder, layout="flax")["model"]["layers"]["0"]
    layer = fp8jax.nnx.Linear(K, M, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(kernel["self_attn"]["o_proj"]["kernel"])
    np.testing.assert_array_equal(layer(x), got)


@pytest.mark.parametrize("shape", [(3, M, 1), (3, M), (3,), (3, 1, 1), (3, 1)])
def test_stacked_experts_have_scales_of_their_own(tmp_path, shape):
    codes = random_codes(np.random.default_rng(0), (3, M, K), E4M3)
    scale = positive(shape)
    tensors = {"mlp.experts.down_proj": codes, "mlp.experts.down_proj_scale": scale}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    (q,) = checkpoint.load(tmp_path).values()
    per_row = scale.reshape(3, -1, 1)
    values = codes.astype(np.float32) * per_row
    np.testing.assert_array_equal(q.dequantize(jnp.float32), values)


@pytest.mark.parametrize("where", ["config", "text_config", "groups"])
def test_blocks_of_other_sides_are_those_of_the_config(tmp_path, where):
    quantization = {"weight_block_size": [64, 32]}
    if where == "groups":
        quantization = compressed("block")
        group = quantization["config_groups"]["group_0"]
        group["weights"]["block_structure"] = [64, 32]
    config = {"quantization_config": quantization}
    config = {"text_config": config} if where == "text_config" else config
    codes = random_codes(np.random.default_rng(0), (M, K), E4M3)
    scale = positive((M // 64, K // 32))
    tensors = {"a.weight": codes, "a.weight_scale": scale}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (q,) = checkpoint.load(tmp_path).values()
    assert q.tile == (64, 32)
    values = codes.astype(np.float32) * np.repeat(np.repeat(scale, 64, 0), 32, 1)
    np.testing.assert_array_equal(q.dequantize(jnp.float32), values)


@pytest.mark.parametrize("shape", [(M + 1, 1), (2,), (1, K), (2, 2), (1, 1, 1)])
def test_a_scale_of_nothing_says_what_is_taken(tmp_path, shape):
    codes = random_codes(np.random.default_rng(0), (M, K), E4M3)
    tensors = {"a.weight": codes, "a.weight_scale": positive(shape)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"per output channel.*one per matrix"):
        Reader(tmp_path)
