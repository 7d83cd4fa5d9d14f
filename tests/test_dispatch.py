"""The table of implementations: choice, refusals, and no silent fall-back."""

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax import _dispatch, matmul, quant
from fp8jax.kernels import xla

CALL = {"tile": (1, 128), "dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0}


@pytest.fixture
def two_implementations(monkeypatch):
    """Makes both implementations available, the first one a kernel that refuses."""

    def refuse(x, **_):
        raise NotImplementedError(f"takes no {x.dtype}.")

    def marked(op, name):
        return {
            "mosaic_gpu": lambda x, static, caller: refuse(x),
            "xla": lambda x, static, caller: getattr(xla, op)(x, **dict(static)),
        }[name]

    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    monkeypatch.setattr(_dispatch, "_marked", marked)


@pytest.mark.usefixtures("two_implementations")
def test_a_refusal_passes_the_call_on():
    x = jnp.ones((2, 128))
    data, _ = _dispatch.call("quantize", x, implementation=None, **CALL)
    assert data.shape == x.shape
    assert _dispatch.resolve("quantize", x, implementation=None, **CALL) == "xla"


@pytest.mark.usefixtures("two_implementations")
def test_an_explicit_choice_never_falls_back_and_gives_its_reason():
    x = jnp.ones((2, 128))
    message = r"quantize cannot run as asked, 'mosaic_gpu'\. .*takes no float32"
    for run in (_dispatch.call, _dispatch.resolve):
        with pytest.raises(NotImplementedError, match=message):
            run("quantize", x, implementation="mosaic_gpu", **CALL)


def test_every_refusal_is_shown_when_nothing_takes_the_call(monkeypatch):
    def refuse(name):
        raise NotImplementedError(f"{name} is out.")

    monkeypatch.setattr(_dispatch, "check_available", refuse)
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu is out.*xla is out"):
        _dispatch.call("quantize", jnp.ones((2, 128)), implementation=None, **CALL)


def test_every_implementation_in_the_table_exists():
    import importlib

    for op, names in _dispatch._TABLE.items():
        for name in names:
            assert callable(
                getattr(importlib.import_module(f"fp8jax.kernels.{name}"), op)
            )


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)
def test_kernels_that_add_in_place_lower_where_derivatives_are_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    sizes = jnp.array([100, 28], jnp.int32)

    def run(x, total, totals):
        q = fp8jax.quantize(x)
        block = fp8jax.quantize(x, fp8jax.BLOCK_128X128)
        _, grouped = quant.quantize_grouped(x, sizes)
        return (
            fp8jax.scaled_matmul(q, block, out_dtype=jnp.float32, accumulate=total),
            matmul.grouped_wgrad(grouped, grouped, sizes, accumulate=totals),
        )

    arrays = jnp.ones((128, 256)), jnp.ones((128, 128)), jnp.ones((2, 256, 256))
    for fn, args in (
        (run, arrays),
        (jax.vmap(run), [jnp.stack([a, a]) for a in arrays]),
    ):
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
