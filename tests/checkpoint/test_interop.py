"""Both ways between this library and torch, safetensors.torch and transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import checkpoint
from fp8jax.testing import assert_same_bits
from tests.checkpoint import deepseek_v3

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.interop

SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


def bits(x) -> np.ndarray:
    return x.detach().contiguous().view(torch.uint8).numpy()


def blockwise(x, tile: int = 128):
    """Codes and scales of a torch matrix, as DeepSeek-V3's own script makes them."""
    m, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % tile, 0, -m % tile))
    tiles = padded.reshape(-(-m // tile), tile, -(-k // tile), tile)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).reshape(padded.shape)[:m, :k].contiguous()
    return codes.view(torch.float8_e4m3fn), scale


def dequantized(codes, scale, tile: int = 128):
    m, k = codes.shape
    wide = scale.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[:m, :k]
    return codes.float() * wide


@pytest.mark.parametrize("e8m0", [False, True])
def test_what_torch_wrote_loads_bit_for_bit(tmp_path, e8m0):
    torch.manual_seed(0)
    codes, scale = blockwise(torch.randn(576, 300))
    if e8m0:
        exponents = torch.randint(100, 140, (5, 3), dtype=torch.uint8)
        stored, scale = exponents.view(torch.float8_e8m0fnu), 2.0 ** (exponents - 127.0)
    else:
        stored = scale
    tensors = {
        "model.layers.0.w.weight": codes,
        "model.layers.0.w.weight_scale_inv": stored,
        "model.norm.weight": torch.randn(300).bfloat16(),
    }
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    params = checkpoint.load(tmp_path)
    q = params["model.layers.0.w.weight"]
    assert_same_bits(np.asarray(q.data).view(np.uint8), bits(codes))
    assert_same_bits(q.scale, scale.float().numpy())
    norm = np.asarray(params["model.norm.weight"])
    assert_same_bits(norm.view(np.uint8), bits(tensors["model.norm.weight"]))
    expected = dequantized(codes, scale.float()).numpy()
    assert_same_bits(q.dequantize(), expected)


def test_torch_reads_what_we_wrote_bit_for_bit(tmp_path):
    x = jax.random.normal(jax.random.key(0), (576, 300))
    q = fp8jax.quantize(x, SPEC)
    checkpoint.save(tmp_path, {"w.weight": q, "b": jnp.arange(5, dtype=jnp.bfloat16)})
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    codes, scale = tensors["w.weight"], tensors["w.weight_scale_inv"]
    assert codes.dtype == torch.float8_e4m3fn
    assert_same_bits(bits(codes), np.asarray(q.data).view(np.uint8))
    assert_same_bits(dequantized(codes, scale).numpy(), q.dequantize())


@pytest.fixture
def deepseek():
    """DeepSeek-V3's architecture, scaled down, with random weights in BF16."""
    pytest.importorskip("accelerate")  # Which its FP8 models ask for.
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=128,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    return transformers, model.to(torch.bfloat16).eval()


def test_transformers_loads_our_model_without_a_weights_difference(deepseek, tmp_path):
    transformers, model = deepseek
    model.save_pretrained(tmp_path / "plain")
    outcomes = checkpoint.quantize_checkpoint(tmp_path / "plain", tmp_path / "fp8")
    changed = {o.name for o in outcomes if not o.note}
    assert any("experts" in name for name in changed)
    assert any("self_attn" in name for name in changed)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"

    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        quantization_config=transformers.FineGrainedFP8Config(
            dequantize=True,
            modules_to_not_convert=config["quantization_config"][
                "modules_to_not_convert"
            ],
        ),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    # Saved again by transformers, in the names of the files.
    checkpoint.dequantize_checkpoint(tmp_path / "fp8", tmp_path / "ours")
    ours = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16
    )
    theirs = loaded.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs[name].to(weight.dtype), weight), name

    tokens = torch.arange(32)[None] * 7 % 256
    with torch.no_grad():
        exact = model(tokens).logits.float()
        logits, dequantized_logits = (m(tokens).logits.float() for m in (loaded, ours))
    assert torch.equal(logits, dequantized_logits)
    cosine = torch.nn.functional.cosine_similarity(exact, logits, dim=-1)
    # Codes alone cost 31 dB, a cosine of 0.9996; some products' errors add up.
    assert cosine.mean() > 0.99


def test_logits_are_those_of_transformers(deepseek, tmp_path):
    transformers, model = deepseek
    model.save_pretrained(tmp_path / "plain")
    checkpoint.quantize_checkpoint(tmp_path / "plain", tmp_path / "fp8")
    checkpoint.dequantize_checkpoint(
        tmp_path / "fp8", tmp_path / "back", dtype="float32"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32
    ).eval()
    tokens = np.arange(32) * 7 % 256
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)[None]).logits[0].numpy()

    fields = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config = deepseek_v3.Config.of(fields)
    forward = functools.partial(deepseek_v3.logits, config=config)
    params = checkpoint.load(tmp_path / "fp8")
    arrays = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, fp8jax.QTensor) else w,
        params,
        is_leaf=lambda w: isinstance(w, fp8jax.QTensor),
    )
    exact = jax.jit(forward)(arrays, tokens)
    # A float32 sum of 384 products at most, 15 of them one behind the other.
    error = fp8jax.numerics.relative_error(exact, expected)
    assert error < 15 * 384 * 2**-24

    in_fp8 = fp8jax.fp8_transform(forward, weight_dtype=jnp.float32)
    rows = in_fp8.report(params, tokens).rows
    stored = sum(isinstance(w, fp8jax.QTensor) for w in params.values())
    static = sum("stored in FP8" in row.reason for row in rows)
    assert static == stored == 36
    got = in_fp8(params, tokens)
    # Rounding activations costs a product some 30 dB; the errors of a dozen add up to
    # 19 dB, a cosine of 0.994. A token whose experts change costs more; most do not.
    assert fp8jax.numerics.cosine_similarity(got, expected) > 0.99
