"""Tiny random models of transformers, quantized by default rules and loaded there."""

import json

import pytest

from fp8jax import checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # Which its FP8 models ask for.
pytestmark = pytest.mark.interop

COMMON = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 384, "num_layers": 2, "num_heads": 4}
BART = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 2), ("ffn_dim", 384), ("attention_heads", 4))
}
MODELS = {
    "Llama": COMMON,
    "Qwen3": {**COMMON, "tie_word_embeddings": True},
    "Qwen3Moe": {**COMMON, **EXPERTS, "num_experts": 4},
    "Mixtral": {**COMMON, "num_local_experts": 4},
    "Gemma3Text": COMMON,
    "Glm4": COMMON,
    "T5": {**T5, "vocab_size": 256},
    "Bart": {**BART, "d_model": 256, "vocab_size": 256},
}


@pytest.mark.parametrize("name", MODELS)
def test_it_loads_dequantized_with_every_weight(tmp_path, name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "plain")
    outcomes = checkpoint.quantize_checkpoint(tmp_path / "plain", tmp_path / "fp8")
    assert any(not o.note for o in outcomes)
    written = json.loads((tmp_path / "fp8" / "config.json").read_text())
    kept = written["quantization_config"]["modules_to_not_convert"]
    loaded, told = auto.from_pretrained(
        tmp_path / "fp8",
        quantization_config=transformers.FineGrainedFP8Config(
            dequantize=True, modules_to_not_convert=kept
        ),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokens = torch.arange(32)[None] * 7 % 253 + 3
    more = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    with torch.no_grad():
        exact, logits = (m(tokens, **more).logits.float() for m in (model, loaded))
    # Of all logits together: a token whose router is at a tie may take another expert.
    cosine = torch.nn.functional.cosine_similarity(exact.ravel(), logits.ravel(), dim=0)
    assert cosine > 0.99
