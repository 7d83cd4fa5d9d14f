"""`nnx.tabulate` prints of our layers what it prints of Flax's."""

import jax.numpy as jnp
import pytest
from flax import nnx

import fp8jax.nnx

LAYERS = {
    "Linear": lambda layers, rngs: layers.Linear(128, 256, rngs=rngs),
    "LinearGeneral": lambda layers, rngs: layers.LinearGeneral(128, 256, rngs=rngs),
    "Einsum": lambda layers, rngs: layers.Einsum("ab,bc->ac", (128, 256), rngs=rngs),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"compute_flops": True}])
@pytest.mark.parametrize("vjp", [False, True], ids=["", "vjp"])
def test_a_layer_has_one_row(name, options, vjp):
    if vjp:
        options = {**options, "compute_vjp_flops": True}
    x = jnp.ones((4, 128))
    ours, flax = (
        nnx.tabulate(LAYERS[name](layers, nnx.Rngs(0)), x, **options)
        for layers in (fp8jax.nnx, nnx)
    )
    # Cells differ where a table names the layer's module; their number does not.
    assert ours.count("├─") == flax.count("├─")
    assert "dot_general" not in ours
    assert "einsum_op" not in ours
    assert name in ours
