"""`module.tabulate` of our Linen layers: Flax's rows, and a block's own."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fp8jax.linen

X = jnp.ones((2, 4, 128))
LAYERS = {
    "Dense": lambda layers: layers.Dense(256),
    "DenseGeneral": lambda layers: layers.DenseGeneral((2, 64)),
    "Einsum": lambda layers: layers.Einsum((128, 2, 64), "btd,dhk->bthk"),
    "MultiHeadAttention": lambda layers: layers.MultiHeadAttention(2),
}
BLOCKS = {
    "SwiGLU": (fp8jax.linen.SwiGLU(256), 3),
    "RMSNormDense": (fp8jax.linen.RMSNormDense(256), 2),
    "MoE": (fp8jax.linen.MoE(256, 4, 2, num_shared=1), 8),
}


def rows_of(layer, **options):
    """Cells of the rows of modules, without those of what a table counts."""
    wide = {"width": 240, "force_terminal": False}
    text = layer.tabulate(jax.random.key(0), X, console_kwargs=wide, **options)
    lines = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("vjp", [False, True], ids=["", "vjp"])
def test_a_layer_s_rows_are_flax_s(name, vjp):
    options = {"compute_flops": True, "compute_vjp_flops": vjp}
    both = fp8jax.linen, nn
    ours, flax = (rows_of(LAYERS[name](layers), **options) for layers in both)

    def without_counts(rows):
        return [[x for x in row if not re.fullmatch(r"\d+", x)] for row in rows]

    assert without_counts(ours) == without_counts(flax)
    for repeated in (False, True):
        ours, flax = (
            rows_of(LAYERS[name](layers), show_repeated=repeated) for layers in both
        )
        assert ours == flax


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("vjp", [False, True], ids=["", "vjp"])
def test_a_block_has_a_row_for_each_parameter_and_its_flops(name, vjp):
    block, parameters = BLOCKS[name]
    rows = rows_of(block, compute_flops=True, compute_vjp_flops=vjp)
    assert rows[0][1] == name
    assert int(rows[0][4]) > 0
    named = [row for row in rows if row[1] == "Parameter"]
    assert len(named) + (2 if name == "MoE" else 0) == parameters
