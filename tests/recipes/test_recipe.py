"""Recipes refuse what is known not to train."""

import dataclasses

import pytest

import fp8jax
from fp8jax import recipes


def test_deepseek_v3_is_the_report_s_table():
    recipe = recipes.deepseek_v3()
    tiles = {
        name: (getattr(recipe, name).lhs.tile, getattr(recipe, name).rhs.tile)
        for name in ("fprop", "dgrad", "wgrad")
    }
    assert tiles == {
        "fprop": ((1, 128), (128, 128)),
        "dgrad": ((1, 128), (128, 128)),
        "wgrad": ((1, 128), (1, 128)),
    }
    assert recipe.fprop.lhs.scale == "pow2"
    assert recipes.deepseek_v3("fp32").wgrad.rhs.scale == "fp32"


def test_blocked_wgrad_differs_from_deepseek_in_one_tile():
    blocked = recipes.blocked_wgrad("fp32", residual="bf16")
    assert blocked.wgrad.lhs.tile == (128, 128)
    lhs = dataclasses.replace(blocked.wgrad.lhs, tile=(1, 128))
    wgrad = dataclasses.replace(blocked.wgrad, lhs=lhs)
    same = dataclasses.replace(blocked, wgrad=wgrad)
    assert same == recipes.deepseek_v3("fp32", residual="bf16")


def test_presets_say_what_is_off():
    assert recipes.bf16().is_off
    assert not recipes.bf16_wgrad().is_off
    assert recipes.bf16_wgrad().wgrad is None


def test_blocked_gradients_are_refused_with_the_reason():
    block = fp8jax.GemmSpec(fp8jax.BLOCK_128X128, fp8jax.BLOCK_128X128)
    for name in ("dgrad", "wgrad"):
        with pytest.raises(ValueError, match=r"diverged .*appendix B\.2"):
            dataclasses.replace(recipes.deepseek_v3(), **{name: block})


def test_fp8_residuals_need_all_gemms():
    with pytest.raises(ValueError, match="all three GEMMs in FP8"):
        dataclasses.replace(recipes.bf16_wgrad(), residual="fp8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp8jax.GemmSpec(fp8jax.TILE_128X1, fp8jax.TILE_1X128), "lhs.tile"),
        (lambda: fp8jax.GemmSpec((1, 128), fp8jax.TILE_1X128), "got lhs=\\(1, 128\\)"),
        (lambda: fp8jax.Recipe("fp8", None, None), "got fprop='fp8'"),
        (lambda: fp8jax.Recipe(None, None, None, "bf8"), "got 'bf8'"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
