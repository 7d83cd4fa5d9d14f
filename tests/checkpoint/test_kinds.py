"""Every kind of scale that is published: names and config.json's fields are real.

The oracle is NumPy's `codes * scale` with the scale repeated by the format's own rule.
"""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import fp8jax
from fp8jax.checkpoint import (
    CheckpointError,
    Reader,
    dequantize_checkpoint,
    diff,
    load,
    quantize_checkpoint,
)
from fp8jax.cli import main
from fp8jax.testing import assert_same_bits, random_codes

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
E8M0 = ml_dtypes.float8_e8m0fnu

FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def compressed_tensors(strategy, **more):
    """llm-compressor's, as its FP8_DYNAMIC and FP8_BLOCK schemes write it."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "strategy": strategy, **more},
        "input_activations": {**weights, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight `[out, in]`, its scale's name, shape and dtype, and what they mean."""

    scale: str
    shape: tuple[int, ...]
    kind: str
    tile: tuple[int, int]
    quantization: dict | None = None
    dtype: type = np.float32
    sides: tuple[int, int] = (128, 128)  # That a scale stands for.
    nested: bool = False
    weight: tuple[int, ...] = (256, 384)


TILE, STACK = (128, 128), (2, 256, 384)
CASES = {
    "DeepSeek-V3": Case("weight_scale_inv", (2, 3), "tiles", TILE, FP8_BLOCK),
    "DeepSeek-V4": Case("scale", (2, 3), "tiles", TILE, FP8_BLOCK, dtype=E8M0),
    "MiniMax": Case("weight_scale_inv", (2, 3), "tiles", TILE, FP8_BLOCK, dtype=BF16),
    "llm-compressor FP8_BLOCK": Case(
        "weight_scale",
        (2, 3),
        "tiles",
        TILE,
        compressed_tensors("block", block_structure=[128, 128]),
    ),
    "ModelOpt PB_WO": Case(
        "weight_scale",
        (2, 1, 3, 1),
        "tiles",
        TILE,
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
    ),
    "llm-compressor FP8_DYNAMIC": Case(
        "weight_scale",
        (256, 1),
        "row",
        (1, 128),
        compressed_tensors("channel"),
        dtype=BF16,
        sides=(1, 384),
    ),
    "fbgemm": Case(
        "weight_scale",
        (256, 1),
        "row",
        (1, 128),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        sides=(1, 384),
    ),
    "rows of stacked experts": Case(
        "weight_scale",
        (2, 256, 1),
        "row",
        (1, 128),
        sides=(1, 384),
        weight=STACK,
    ),
    "columns of stacked experts": Case(
        "weight_scale",
        (2, 1, 384),
        "column",
        (128, 1),
        sides=(256, 1),
        weight=STACK,
    ),
    "a scale for each expert": Case(
        "weight_scale",
        (2, 1, 1),
        "tensor",
        TILE,
        sides=(256, 384),
        weight=STACK,
    ),
    "AutoFP8": Case(
        "weight_scale",
        (),
        "tensor",
        TILE,
        {"quant_method": "fp8", "activation_scheme": "static"},
        sides=(256, 384),
    ),
    "ModelOpt FP8": Case(
        "weight_scale",
        (1,),
        "tensor",
        TILE,
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        sides=(256, 384),
    ),
    "Ministral": Case(
        "weight_scale_inv",
        (),
        "tensor",
        TILE,
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
        },
        dtype=BF16,
        sides=(256, 384),
    ),
    "Mistral's own": Case("qscale_weight", (), "tensor", TILE, sides=(256, 384)),
    "64x64": Case(
        "weight_scale",
        (4, 6),
        "tiles",
        (64, 64),
        compressed_tensors("block", block_structure=[64, 64]),
        sides=(64, 64),
    ),
    "DeepSeek-V4.1's 32x32": Case(
        "scale",
        (8, 12),
        "tiles",
        (32, 32),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        dtype=E8M0,
        sides=(32, 32),
    ),
    "1x32": Case(
        "weight_scale",
        (256, 12),
        "tiles",
        (1, 32),
        compressed_tensors("group", group_size=32),
        sides=(1, 32),
    ),
    "text_config": Case(
        "weight_scale_inv",
        (4, 6),
        "tiles",
        (64, 64),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        sides=(64, 64),
        nested=True,
    ),
}
IN_TILES_OF_128 = [name for name, case in CASES.items() if case.sides[1] >= 128]
MATRICES = [name for name in IN_TILES_OF_128 if len(CASES[name].weight) == 2]


@pytest.fixture
def written(tmp_path):
    """A folder of a case, and its weight's values."""

    def write(name):
        case, rng = CASES[name], np.random.default_rng(0)
        codes = random_codes(rng, case.weight)
        exponents = rng.integers(-9, -5, case.shape)
        # Four bits of mantissa are exact in bfloat16; e8m0 has none.
        mantissa = 1 if case.dtype == E8M0 else rng.integers(16, 32, case.shape) / 16
        scale = np.asarray(mantissa * 2.0**exponents, np.float32)
        tensors = {
            "l.up.weight": codes,
            f"l.up.{case.scale}": scale.astype(case.dtype),
            "l.norm.weight": np.ones(3, BF16),
        }
        if not case.shape:
            tensors["l.up.input_scale"] = np.full((), 0.5, np.float32)
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        config = {"quantization_config": case.quantization} if case.quantization else {}
        config = {"text_config": config} if case.nested else config
        (tmp_path / "config.json").write_text(json.dumps(config))
        *batch, m, k = case.weight
        rows, columns = -(-m // case.sides[0]), -(-k // case.sides[1])
        wide = scale.reshape(*batch, rows, columns)
        wide = wide.repeat(case.sides[0], -2).repeat(case.sides[1], -1)
        return tmp_path, codes.astype(np.float32) * wide[..., :m, :k]

    return write


@pytest.mark.parametrize("name", CASES)
def test_it_loads_and_dequantizes_exactly(written, tmp_path, name):
    case = CASES[name]
    path, values = written(name)
    weight = Reader(path)["l.up.weight"]
    assert (weight.kind, weight.tile) == (case.kind, case.tile)
    q = load(path)["l.up.weight"]
    q.check("test")
    assert_same_bits(q.dequantize(), values)

    dequantize_checkpoint(path, tmp_path / "plain", dtype="float32")
    plain = safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    assert_same_bits(plain["l.up.weight"], values)
    whats = {d.name: d.what for d in diff(path, tmp_path / "plain")}
    assert whats["l.up.weight"] == "same values"
    assert f"l.up.{case.scale}" not in plain


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("way", ["layer", "transform"])
def test_it_is_multiplied_by_its_codes(written, name, way):
    path, values = written(name)
    q = load(path, layout="flax")["l"]["up"]["kernel"]
    x = np.random.default_rng(1).standard_normal((32, 384), np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    if way == "layer":
        layer = fp8jax.nnx.Linear(384, 256, use_bias=False, rngs=nnx.Rngs(0))
        layer.kernel = nnx.Param(q)
        y = layer(x)
    else:
        apply = fp8jax.fp8_transform(lambda params, x: x @ params)
        (row,) = apply.report(q, x).rows
        assert row.status == "fp8"
        y = apply(q, x)
    # The activations' codes, which both quantize so, are the only inexact operand; what
    # is left is the rounding of sums in float32 and of y in bfloat16, 2^-9 of each.
    spec = fp8jax.QuantSpec(tile=(1, 128))
    best = min(
        _distance(y, fp8jax.quantize(x, dataclasses.replace(spec, scale=s)), values)
        for s in ("fp32", "pow2")
    )
    assert best < 2**-8


def _distance(y, x, values):
    expected = np.asarray(x.dequantize(), np.float64) @ values.T.astype(np.float64)
    off = np.asarray(y, np.float64) - expected
    return np.linalg.norm(off) / np.linalg.norm(expected)


def test_a_static_input_scale_loads_beside_its_weight(written):
    path, _ = written("AutoFP8")
    flax = load(path, layout="flax")
    assert flax["l"]["up"]["input_scale"] == jnp.float32(0.5)


def test_other_tiles_are_read_where_they_are_given(written, tmp_path):
    path, values = written("64x64")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"\(4, 6\).*tiles of \(128, 128\)"):
        Reader(path)
    assert_same_bits(load(path, tile=(64, 64))["l.up.weight"].dequantize(), values)
    dequantize_checkpoint(path, tmp_path / "p", dtype="float32", tile=(64, 64))
    plain = safetensors.numpy.load_file(tmp_path / "p" / "model.safetensors")
    assert_same_bits(plain["l.up.weight"], values)


def u8(*shape):
    return np.ones(shape, np.uint8)


MIXES = {
    "NVFP4": {  # ModelOpt's
        "weight": u8(128, 64),
        "weight_scale": np.ones((128, 8), E4M3),
        "weight_scale_2": np.ones((), np.float32),
        "input_scale": np.ones((), np.float32),
    },
    "NVFP4 ": {  # compressed-tensors' nvfp4-pack-quantized
        "weight_packed": u8(128, 64),
        "weight_scale": np.ones((128, 8), E4M3),
        "weight_global_scale": np.ones(1, np.float32),
        "input_global_scale": np.ones(1, np.float32),
    },
    "packed integers": {  # compressed-tensors' pack-quantized
        "weight_packed": np.ones((128, 16), np.int32),
        "weight_scale": np.ones((128, 1), BF16),
        "weight_shape": np.ones(2, np.int64),
    },
    "GPTQ or AWQ": {
        "qweight": np.ones((16, 128), np.int32),
        "qzeros": np.ones((1, 16), np.int32),
        "scales": np.ones((1, 128), np.float16),
    },
    "MXFP4": {  # gpt-oss'
        "gate_up_proj_blocks": u8(2, 128, 4, 16),
        "gate_up_proj_scales": u8(2, 128, 4),
    },
    "MXFP4 ": {  # DeepSeek-V4's experts
        "weight": u8(128, 64),
        "scale": u8(128, 4).view(E8M0),
    },
    "int8": {
        "weight": np.ones((128, 128), np.int8),
        "weight_scale": np.ones((128, 1), np.float32),
    },
}


@pytest.mark.parametrize("kind", MIXES)
def test_fp8_and_plain_parts_load_beside_others(tmp_path, kind):
    codes = random_codes(np.random.default_rng(0), (128, 128))
    others = {f"l.0.{name}": x for name, x in MIXES[kind].items()}
    tensors = {
        "l.1.weight": codes,
        "l.1.weight_scale": np.ones((128, 1), np.float32),
        "norm.weight": np.ones(3, BF16),
        "mask": u8(3),
        **others,
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    reader = Reader(tmp_path)
    assert set(reader) == {"l.1.weight", "norm.weight", "mask"}
    assert reader.others == dict.fromkeys(others, kind.strip())
    with pytest.warns(UserWarning, match=f"leaves out {len(others)}.*{kind.strip()}"):
        params = load(tmp_path)
    assert set(params) == set(reader)
    assert_same_bits(params["l.1.weight"].data, codes)
    asked = next(iter(others))
    assert asked not in reader
    with pytest.raises(CheckpointError, match=f"'{asked}'.*{kind.strip()}"):
        reader.codes(asked)
    for rewritten in (quantize_checkpoint, dequantize_checkpoint):
        with pytest.raises(ValueError, match=f"'{asked}' of {kind.strip()}"):
            rewritten(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_two_sets_of_weights_the_one_asked_for_is_read(tmp_path):
    for name, file in (("layers.wq", "consolidated"), ("model.q_proj", "model")):
        tensors = {f"{name}.weight": np.ones((2, 2), BF16)}
        safetensors.numpy.save_file(tensors, tmp_path / f"{file}.safetensors")
    assert list(Reader(tmp_path)) == ["model.q_proj.weight"]
    own = "consolidated.safetensors"
    assert list(Reader(tmp_path / own)) == ["layers.wq.weight"]
    index = tmp_path / f"{own}.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.wq.weight": own}}))
    assert list(Reader(index)) == ["layers.wq.weight"]
    assert list(Reader(tmp_path)) == ["model.q_proj.weight"]


def test_inspect_says_which_kinds_there_are(written, capsys):
    path, _ = written("fbgemm")
    main(["inspect", str(path)])
    assert "FP8, a scale for each: row (1)" in capsys.readouterr().out
    tensors = {f"l.0.{name}": x for name, x in MIXES["NVFP4"].items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    main(["inspect", str(path)])
    assert "not read: 4 tensors of weights in NVFP4" in capsys.readouterr().out


def test_the_command_line_takes_tiles(written, tmp_path, capsys):
    path, values = written("64x64")
    (path / "config.json").unlink()
    main(["inspect", str(path), "--tile", "64x64"])
    assert "64x64 (1)" in capsys.readouterr().out
    target = tmp_path / "out"
    options = ["--tile", "64x64", "--dtype", "float32"]
    main(["dequantize", str(path), str(target), *options])
    plain = safetensors.numpy.load_file(target / "model.safetensors")
    assert_same_bits(plain["l.up.weight"], values)
    for wrong in ("64", "0x64", "ax2"):
        with pytest.raises(SystemExit):
            main(["inspect", str(path), "--tile", wrong])
        assert "two sides are wanted" in capsys.readouterr().err
