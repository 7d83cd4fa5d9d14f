"""`save`: what it writes, others read; what is killed leaves the old files whole."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.flax

import fp8jax
from fp8jax import checkpoint
from fp8jax.checkpoint import _publish
from fp8jax.testing import assert_same_bits


@pytest.fixture
def params():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    spec = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")
    return {
        "embed.weight": jax.random.normal(next(keys), (50, 8)),
        "0.up.weight": fp8jax.quantize(jax.random.normal(next(keys), (576, 300)), spec),
        "0.up.bias": jax.random.normal(next(keys), (576,), jnp.bfloat16),
        "1.up.weight": fp8jax.quantize(jax.random.normal(next(keys), (128, 128)), spec),
        "head.weight": jax.random.normal(next(keys), (50, 8), jnp.bfloat16),
    }


def names(folder):
    return sorted(os.listdir(folder))


def test_round_trip_bit_for_bit(params, tmp_path):
    checkpoint.save(tmp_path / "m", params)
    assert names(tmp_path / "m") == ["config.json", "model.safetensors"]
    assert_same_bits(checkpoint.load(tmp_path / "m"), params)
    assert names(tmp_path) == ["m"]


def test_flax_trees_round_trip_and_lie_in_the_orientation_of_hf(params, tmp_path):
    checkpoint.save(tmp_path / "a", params)
    tree = checkpoint.load(tmp_path / "a", layout="flax")
    checkpoint.save(tmp_path / "b", tree, layout="flax")
    assert_same_bits(checkpoint.load(tmp_path / "b"), params)


def test_theirs_reads_what_it_can_of_ours(params, tmp_path):
    checkpoint.save(tmp_path, params)
    with safetensors.safe_open(tmp_path / "model.safetensors", "flax") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("0.up.weight").get_dtype() == "F8_E4M3"
        assert file.get_slice("0.up.weight").get_shape() == [576, 300]
        for name in ("0.up.bias", "0.up.weight_scale_inv", "embed.weight"):
            ours = params[name] if name in params else params["0.up.weight"].scale
            assert_same_bits(file.get_tensor(name), ours)


def test_shards_index_and_config(params, tmp_path):
    config = {"model_type": "x", "quantization_config": {"quant_method": "other"}}
    checkpoint.save(tmp_path, params, config=config, max_shard_bytes=100_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"]["0.up.weight"]
        == (index["weight_map"]["0.up.weight_scale_inv"])
    )
    nbytes = sum(np.asarray(x).nbytes for x in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == nbytes
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {
        "model_type": "x",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["embed", "head"],
            "ignored_layers": ["embed", "head"],
        },
    }
    assert_same_bits(checkpoint.load(tmp_path), params)


def test_without_fp8_there_is_no_quantization_config(tmp_path):
    checkpoint.save(tmp_path, {"a": jnp.ones(3)}, config={"quantization_config": {}})
    assert json.loads((tmp_path / "config.json").read_text()) == {}


def test_ue8m0_scales_are_bytes_and_the_same_numbers(tmp_path):
    x = jax.random.normal(jax.random.key(0), (256, 300))
    q = fp8jax.quantize(x, fp8jax.BLOCK_128X128)  # Powers of two.
    checkpoint.save(tmp_path, {"w": q}, scale="ue8m0")
    reader = checkpoint.Reader(tmp_path)
    assert reader["w"].scale.dtype == np.dtype(jnp.float8_e8m0fnu)
    assert reader.config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert_same_bits(checkpoint.load(tmp_path)["w"], q)


def test_other_files_stay_and_old_shards_go(params, tmp_path):
    checkpoint.save(tmp_path, params, max_shard_bytes=100_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.txt").write_text("x")
    checkpoint.save(tmp_path, {"a": jnp.ones(3)})
    assert names(tmp_path) == [
        "config.json",
        "model.safetensors",
        "sub",
        "tokenizer.json",
    ]
    assert (tmp_path / "sub" / "x.txt").read_text() == "x"


def test_without_an_exchange_of_names_the_folder_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.setattr(_publish.ctypes, "CDLL", lambda *_, **__: object())
    for value in (1, 2):
        checkpoint.save(tmp_path / "m", {"a": jnp.full(3, value)})
    assert checkpoint.load(tmp_path / "m")["a"].tolist() == [2, 2, 2]
    assert names(tmp_path) == ["m"]


Q = fp8jax.quantize(jnp.ones((128, 128)), fp8jax.BLOCK_128X128)


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"w": 3.0}, {}, "save takes arrays, got <class 'float'> for 'w'"),
        ({"w": jnp.ones(3, "complex64")}, {}, "save got complex64 for 'w'"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, {}, r"two leaves called 'a\.b'"),
        ({"w": Q, "w_scale_inv": np.ones(1)}, {}, "two leaves called 'w_scale_inv'"),
        ({"w": Q, "v": fp8jax.quantize(jnp.ones((2, 2)))}, {}, "of one tile and form"),
        ({"w": Q}, {"scale": "bf16"}, "scale 'fp32' or 'ue8m0', got 'bf16'"),
        ({"w": Q}, {"layout": "x"}, "save takes layout"),
        (
            {"w": fp8jax.QTensor(Q.data, Q.scale * 3, Q.tile)},
            {"scale": "ue8m0"},
            "w has scales that are no powers of two",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_written(
    params, options, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "m", params, **options)
    assert names(tmp_path) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "m").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        checkpoint.save(tmp_path / "m", {})


# Saves over an old checkpoint in one child process after another, each of which dies
# at a later operation on files, until one comes to its end.
KILLED = """
import os, sys
import numpy as np
from fp8jax import checkpoint

folder = sys.argv[1]
new = {name: np.full((4, 4), 2.0) for name in "abcd"}
deaths = 0
while True:
    child = os.fork()
    if child == 0:
        calls = 0
        def die(event, arguments):
            global calls
            if event in ("open", "os.truncate", "os.mkdir", "os.rename", "os.rmdir",
                         "os.remove", "os.listdir", "ctypes.dlsym", "shutil.rmtree"):
                calls += 1
                if calls > deaths:
                    os.kill(os.getpid(), 9)
        sys.addaudithook(die)
        checkpoint.save(folder, new, max_shard_bytes=200)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    tensors = checkpoint.Reader(folder)
    values = {float(tensors.codes(name).max()) for name in tensors}
    shards = len(tensors.files)
    assert (len(tensors), values, shards) in ((4, {1.0}, 1), (4, {2.0}, 4)), deaths
    if status == 0:
        break
    deaths += 1
print(deaths, values)
"""


def test_a_save_killed_at_any_step_leaves_the_old_files_or_the_new(tmp_path):
    folder = tmp_path / "m"
    checkpoint.save(folder, {name: np.full((4, 4), 1.0) for name in "abcd"})
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deaths, values = done.stdout.split(maxsplit=1)
    assert int(deaths) > 20
    assert values.strip() == "{2.0}"
    assert names(tmp_path) == ["m"]


def test_orbax_round_trips_a_tree_of_qtensors_bit_for_bit(params, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", params)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
        restored = checkpointer.restore(tmp_path / "orbax", target)
    assert_same_bits(restored, params)
    assert restored["0.up.weight"].tile == (128, 128)
