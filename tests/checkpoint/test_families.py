"""Which weights of the families become FP8, and what config.json says of the rest.

Names and shapes are those of the published models, or of these scaled down.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fp8jax import checkpoint
from fp8jax.checkpoint import WeightRules, quantize_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("shared.weight", (32128, 512)),  # T5
        ("model.shared.weight", (50304, 1024)),  # BART
        ("encoder.block.0.layer.0.x.relative_attention_bias.weight", (128, 128)),  # T5
        ("transformer.wte.weight", (50304, 768)),  # GPT-2
        ("tok_embeddings.weight", (128256, 4096)),  # Llama's own format
        ("output.weight", (128256, 4096)),
        ("language_model.output.weight", (92544, 4096)),  # InternVL
        ("transformer.output_layer.weight", (65024, 4096)),  # ChatGLM
        ("emb.weight", (65536, 2048)),  # RWKV
        ("model.layers.61.eh_proj.weight", (7168, 14336)),  # DeepSeek-V3
    ],
)
def test_embeddings_and_heads_stay(name, shape):
    assert WeightRules().reason_kept(name, shape, BF16) is not None


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.output.dense.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
        "model.layers.3.shared.gate_proj.weight",
        "model.layers.0.self_attn.q_b_proj.weight",
        "transformer.h.0.attn.c_attn.weight",  # GPT-BigCode: linear.
    ],
)
def test_layers_of_like_names_become_fp8(name):
    assert WeightRules().reason_kept(name, (256, 128), BF16) is None


@pytest.fixture
def quantized(tmp_path):
    def run(shapes, config, rules=None):
        """Names in FP8, and the modules that config.json says are not."""
        tensors = {name: np.ones(shape, BF16) for name, shape in shapes.items()}
        (tmp_path / "in").mkdir()
        safetensors.numpy.save_file(tensors, tmp_path / "in" / "model.safetensors")
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
        outcomes = quantize_checkpoint(tmp_path / "in", tmp_path / "out", rules)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        table = written["quantization_config"]
        assert table["ignored_layers"] == table["modules_to_not_convert"]
        return {o.name for o in outcomes if not o.note}, table["ignored_layers"]

    return run


@pytest.mark.parametrize(
    ("parts", "ragged"),
    [
        (("q_proj", "k_proj", "v_proj"), "k_proj"),
        (("q_a_proj", "kv_a_proj_with_mqa"), "kv_a_proj_with_mqa"),
        (("gate_proj", "up_proj"), "up_proj"),
        (("w1", "w3"), "w1"),
    ],
)
def test_what_vllm_fuses_becomes_fp8_as_a_whole_or_stays(quantized, parts, ragged):
    at = "model.layers.0.x"
    shapes = {f"{at}.{p}.weight": (192 if p == ragged else 256, 128) for p in parts}
    shapes |= {f"{at}.o_proj.weight": (128, 128)}
    fp8, kept = quantized(shapes, {})
    assert fp8 == {f"{at}.o_proj.weight"}
    assert kept == sorted(f"{at}.{p}" for p in parts)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (WeightRules(ragged=True), {"q_a_proj", "kv_a_proj_with_mqa"}),
        (WeightRules(include=["q_a_proj"]), {"q_a_proj"}),
    ],
)
def test_mla_s_pair_becomes_fp8_where_asked_for(quantized, rules, expected):
    at = "model.layers.0.self_attn"
    shapes = {"q_a_proj": (256, 128), "kv_a_proj_with_mqa": (192, 128)}
    shapes = {f"{at}.{name}.weight": shape for name, shape in shapes.items()}
    fp8, _ = quantized(shapes, {}, rules)
    assert fp8 == {f"{at}.{name}.weight" for name in expected}


def test_mixtral_s_experts_that_stay_are_named_as_each_reader_looks_for_them(quantized):
    at = "model.layers.0"
    shapes = {f"{at}.self_attn.o_proj.weight": (128, 128)}
    for w, shape in (("w1", (192, 128)), ("w2", (128, 192)), ("w3", (192, 128))):
        shapes[f"{at}.block_sparse_moe.experts.0.{w}.weight"] = shape
    # One expert's sides would do; but all are one layer.
    shapes[f"{at}.block_sparse_moe.experts.1.w1.weight"] = (256, 128)
    fp8, kept = quantized(shapes, {"model_type": "mixtral"})
    assert fp8 == {f"{at}.self_attn.o_proj.weight"}
    assert f"{at}.mlp.experts" in kept  # transformers' module.
    assert f"{at}.block_sparse_moe.experts" in kept  # vLLM's.
    assert f"{at}.block_sparse_moe.experts.0.w1" in kept


def test_stacked_experts_that_stay_are_named(quantized):
    at = "model.layers.0"
    shapes = {
        f"{at}.self_attn.o_proj.weight": (128, 128),
        f"{at}.mlp.experts.gate_up_proj": (2, 192, 128),
        f"{at}.mlp.experts.down_proj": (2, 128, 128),
    }
    fp8, kept = quantized(shapes, {})
    assert fp8 == {f"{at}.self_attn.o_proj.weight"}
    assert f"{at}.mlp.experts" in kept


@pytest.mark.parametrize(
    ("config", "head", "listed"),
    [
        ({"model_type": "llama", "tie_word_embeddings": True}, None, True),
        ({"text_config": {"tie_word_embeddings": True}}, None, True),  # Gemma 3
        ({"model_type": "gemma3_text"}, None, True),  # Ties by default.
        ({"model_type": "llama", "tie_word_embeddings": False}, None, False),
        ({"model_type": "llama", "tie_word_embeddings": False}, "lm_head", True),
        ({"model_type": "mine"}, "head", False),
    ],
)
def test_a_tied_head_is_listed(quantized, config, head, listed):
    shapes = {"model.embed_tokens.weight": (256, 128), "l.o_proj.weight": (128, 128)}
    if head:
        shapes[f"{head}.weight"] = (256, 128)
    _, kept = quantized(shapes, config)
    assert ("lm_head" in kept) == listed
    assert "model.embed_tokens" in kept


def test_gpt2_s_matrices_stay_but_not_those_of_linear_layers(quantized):
    shapes = {
        "transformer.h.0.attn.c_attn.weight": (128, 384),
        "transformer.h.0.mlp.c_fc.weight": (128, 512),
        "added.weight": (128, 128),
    }
    fp8, kept = quantized(shapes, {"model_type": "gpt2"})
    assert fp8 == {"added.weight"}
    assert "transformer.h.0.mlp.c_fc" in kept


@pytest.mark.parametrize("nested", [False, True])
def test_what_has_a_row_for_each_word_stays_whatever_its_name(quantized, nested):
    config = {"vocab_size": 640}
    config = {"text_config": config} if nested else config
    shapes = {
        "lookup.weight": (640, 128),
        "model.layers.0.mlp.down_proj.weight": (640, 128),
    }
    fp8, kept = quantized(shapes, config)
    assert fp8 == {"model.layers.0.mlp.down_proj.weight"}
    assert "lookup" in kept


@pytest.mark.parametrize(
    ("config", "side_file", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, None, "gptq"),
        ({"quantization_config": {"bits": 4}}, None, "an unnamed method"),
        ({"text_config": {"quantization_config": {"quant_method": "x"}}}, None, "x"),
        ({}, "hf_quant_config.json", "modelopt"),
    ],
)
def test_what_is_quantized_already_is_refused(tmp_path, config, side_file, method):
    x = {"a.weight": np.ones((128, 128), np.float32)}
    checkpoint.save(tmp_path / "in", x)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    if side_file:
        (tmp_path / "in" / side_file).write_text("{}")
    with pytest.raises(ValueError, match=f"not quantized yet.* by '{method}'"):
        checkpoint.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
