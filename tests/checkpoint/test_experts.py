"""Experts of a file stacked for the layers and taken apart again, bit for bit."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.nnx
from fp8jax import checkpoint
from fp8jax.testing import assert_same_bits

EXPERTS, K, HIDDEN = 11, 200, 144  # More than ten: "10" sorts before "2".
SIDES = {"gate_proj": (HIDDEN, K), "up_proj": (HIDDEN, K), "down_proj": (K, HIDDEN)}
AT = "model.layers.3.mlp.experts"


def q_tensor(shape, seed, tile=(128, 128)):
    """Every code but NaN's there is, whatever a quantizer would make."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, np.uint8)
    codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
    scale = rng.random((-(-shape[0] // tile[0]), -(-shape[1] // tile[1])), np.float32)
    return fp8jax.QTensor(
        jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale), tile
    )


@pytest.fixture(scope="module")
def files():
    tensors = {
        f"{AT}.{i}.{name}.weight": q_tensor(shape, [i, j])
        for i in range(EXPERTS)
        for j, (name, shape) in enumerate(SIDES.items())
    }
    return tensors | {"model.norm.weight": jnp.ones(K)}


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "in"
    checkpoint.save(path, files)
    return path


@pytest.fixture
def flax(folder):
    return checkpoint.load(folder, layout="flax")


def experts_of(tree):
    return tree["model"]["layers"]["3"]["mlp"]["experts"]


def test_each_matrix_is_one_qtensor_of_the_files_bytes(folder, flax):
    reader = checkpoint.Reader(folder)
    stacked = checkpoint.stack_experts(flax)
    for old, new in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
        kernel = experts_of(stacked)[new]["kernel"]
        names = [f"{AT}.{i}.{old}.weight" for i in range(EXPERTS)]
        codes = np.stack([reader.codes(n).T for n in names])
        scales = np.stack([reader.scale(n).T for n in names])
        assert kernel.tile == (128, 128)
        kernel.check("test")
        assert_same_bits((kernel.data, kernel.scale), (codes, scales))
        # As products read it: no GPU transposes it first.
        assert kernel.data.format.layout.major_to_minor == (0, 2, 1)
    assert_same_bits(stacked["model"]["norm"], flax["model"]["norm"])


def test_the_tables_are_those_of_the_layer(flax):
    moe = fp8jax.nnx.MoE(K, HIDDEN, EXPERTS, top_k=2, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(moe.experts, nnx.Param))
    stacked = experts_of(checkpoint.stack_experts(flax))
    shapes = jax.tree.map(
        lambda x: x.shape, stacked, is_leaf=lambda x: isinstance(x, fp8jax.QTensor)
    )
    assert shapes == jax.tree.map(lambda x: x.shape, state)


def test_there_and_back_the_files_are_the_same(folder, flax, tmp_path):
    stacked = checkpoint.stack_experts(flax)
    apart = checkpoint.unstack_experts(stacked)
    assert_same_bits(apart, flax)
    checkpoint.save(tmp_path / "out", apart, layout="flax")
    differences = checkpoint.diff(folder, tmp_path / "out")
    assert {d.what for d in differences} == {"same bits"}
    assert len(differences) == 3 * EXPERTS + 1


def test_arrays_and_other_names_stack_too():
    tree = {
        "experts": {str(i): {"w1": {"kernel": jnp.full((2, 3), i)}} for i in (0, 1)}
    }
    stacked = checkpoint.stack_experts(tree, {"w1": "gate"})
    assert stacked["experts"]["gate"]["kernel"].tolist() == [
        [[0] * 3] * 2,
        [[1] * 3] * 2,
    ]
    assert_same_bits(checkpoint.unstack_experts(stacked, {"w1": "gate"}), tree)


def test_what_is_sharded_stays_so(folder):
    mesh = jax.make_mesh((8,), ("model",))

    def columns(name, aval):
        spec = jax.P(None, "model") if "_proj" in name else jax.P()
        return jax.NamedSharding(mesh, spec)

    tree = checkpoint.load(folder, layout="flax", sharding=columns)
    kernel = experts_of(checkpoint.stack_experts(tree))["gate"]["kernel"]
    plain = checkpoint.stack_experts(checkpoint.load(folder, layout="flax"))
    assert_same_bits(kernel, experts_of(plain)["gate"]["kernel"])
    assert kernel.data.sharding.shard_shape(kernel.shape) == (EXPERTS, K, HIDDEN // 8)


Q = q_tensor((128, 128), 0)


def tree_of(*experts):
    return {"mlp": {"experts": dict(experts)}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (tree_of(("0", {"w": Q}), ("2", {"w": Q})), "got ['0', '2'] in mlp/experts: 1"),
        (tree_of(("0", {"w": Q}), ("w", Q)), "got ['0', 'w'] in mlp/experts: 1 is mi"),
        (
            tree_of(("0", {"w": Q, "v": Q}), ("1", {"w": Q})),
            "got v, w in mlp/experts/0 and w in mlp/experts/1",
        ),
        (
            tree_of(("0", {"w": Q}), ("1", {"w": q_tensor((128, 256), 1)})),
            "float8_e4m3fn[128, 128] in tiles of (128, 128) and, of expert 1, "
            "float8_e4m3fn[128, 256] in tiles of (128, 128) in mlp/experts/*/w",
        ),
        (
            tree_of(("0", {"w": Q}), ("1", {"w": q_tensor((128, 128), 1, (1, 128))})),
            "expert 1, float8_e4m3fn[128, 128] in tiles of (1, 128) in mlp/experts/*/w",
        ),
        (
            tree_of(("0", {"w": Q}), ("1", {"w": jnp.ones((128, 128))})),
            "of expert 1, float32[128, 128] in mlp/experts/*/w",
        ),
        (
            tree_of(("0", {"gate": Q, "gate_proj": Q})),
            "gate would be there twice in mlp/experts",
        ),
        ({"model.experts.0.w.weight": Q}, "no table 'experts' to change in a tree of"),
        (tree_of(("gate", Q)), "no table 'experts' to change in a tree of mlp"),
    ],
)
def test_what_does_not_stack_is_refused_by_name(tree, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.stack_experts(tree)


def test_what_cannot_be_taken_apart_is_refused_by_name():
    tree = tree_of(("gate", jnp.ones((2, 3, 4))), ("up", jnp.ones((3, 3, 4))))
    with pytest.raises(ValueError, match=r"\{'gate': 2, 'up': 3\} in mlp/experts"):
        checkpoint.unstack_experts(tree)
    with pytest.raises(ValueError, match="no table 'experts' to change"):
        checkpoint.unstack_experts(tree_of(("0", {"w": Q})))
