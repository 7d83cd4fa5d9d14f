"""Names of real models, as their readers take them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import checkpoint
from fp8jax.checkpoint import WeightRules

BF16 = np.dtype(jnp.bfloat16)
RULES = WeightRules()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("T5", "shared.weight"),
        ("BART", "model.shared.weight"),
        ("Llama's own, InternLM2", "output.weight"),
        ("ChatGLM", "transformer.output_layer.weight"),
        ("RWKV", "emb.weight"),
        ("GPT-2", "transformer.wte.weight"),
        ("Llama's own", "tok_embeddings.weight"),
        ("Qwen", "lm_head.weight"),
        ("BERT", "cls.predictions.decoder.weight"),
    ],
)
def test_embeddings_and_heads_stay(family, name):
    assert RULES.reason_kept(name, (32000, 4096), BF16) in ("embedding", "head"), family


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.output.dense.weight",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
    ],
)
def test_layers_with_such_words_in_their_names_do_not(name):
    assert RULES.reason_kept(name, (512, 256), BF16) is None


def quantized(tmp_path, shapes, config, rules=RULES):
    """The notes by name, and what config.json says stays."""
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    checkpoint.save(tmp_path / "in", tensors, config=config)
    out = checkpoint.quantize_checkpoint(tmp_path / "in", tmp_path / "out", rules)
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    return {o.name: o.note for o in out}, table["quantization_config"]


LAYER = "model.layers.0.self_attn."
Q = {f"{LAYER}q_proj.weight": (128, 128)}


@pytest.mark.parametrize("nested", [False, True])
def test_a_matrix_with_a_row_for_each_word_stays_whatever_its_name(tmp_path, nested):
    config = {"vocab_size": 640}
    config = {"text_config": config} if nested else config
    shapes = {"lookup.weight": (640, 128), "model.layers.0.fc.weight": (640, 128)}
    notes, said = quantized(tmp_path, Q | shapes, config)
    assert notes["lookup.weight"] == "vocabulary"
    assert notes["model.layers.0.fc.weight"] == ""
    assert said["modules_to_not_convert"] == ["lookup"]


def test_mla_s_pair_is_quantized_as_in_deepseek_s_own_files(tmp_path):
    shapes = {
        f"{LAYER}q_a_proj.weight": (256, 128),
        f"{LAYER}kv_a_proj_with_mqa.weight": (72, 128),
    }
    notes, said = quantized(tmp_path, shapes, {})
    assert set(notes.values()) == {""}
    assert said["modules_to_not_convert"] == []
    scale = checkpoint.Reader(tmp_path / "out").scale(
        f"{LAYER}kv_a_proj_with_mqa.weight"
    )
    assert scale.shape == (1, 1)


@pytest.mark.parametrize("scheme", ["ignored_layers", "modules_to_not_convert"])
def test_layers_that_readers_fuse_stay_together(tmp_path, scheme):
    """vLLM refuses q, k and v of which some are FP8."""
    shapes = {
        f"{LAYER}{x}_proj.weight": (rows, 128)
        for x, rows in (("q", 256), ("k", 64), ("v", 64), ("o", 128))
    }
    notes, said = quantized(tmp_path, shapes, {})
    assert notes[f"{LAYER}q_proj.weight"] == f"fused with {LAYER}v_proj.weight"
    assert notes[f"{LAYER}o_proj.weight"] == ""
    assert said[scheme] == [f"{LAYER}{x}_proj" for x in "kqv"]


def test_a_rule_that_splits_a_pair_keeps_both(tmp_path):
    shapes = {
        f"{LAYER}q_a_proj.weight": (256, 128),
        f"{LAYER}kv_a_proj_with_mqa.weight": (72, 128),
        f"{LAYER}o_proj.weight": (128, 128),
    }
    notes, _ = quantized(tmp_path, shapes, {}, WeightRules(exclude=["q_a_proj"]))
    assert [name for name, note in notes.items() if not note] == [
        f"{LAYER}o_proj.weight"
    ]


EXPERTS = "model.layers.{}.mlp.experts"


def test_experts_that_stay_are_named_as_a_module(tmp_path):
    """transformers makes FP8 experts of `mlp.experts`, unless that is named."""
    shapes = {
        f"{EXPERTS.format(layer)}.{i}.{m}.weight": (rows, 128)
        for layer, rows in ((0, 192), (1, 256))
        for i in range(2)
        for m in ("gate_proj", "up_proj")
    }
    shapes[f"{EXPERTS.format(2)}.gate_up_proj"] = (2, 192, 128)
    _, said = quantized(tmp_path, Q | shapes, {"model_type": "qwen3_moe"})
    kept = said["modules_to_not_convert"]
    assert EXPERTS.format(0) in kept
    assert EXPERTS.format(2) in kept
    assert not any(name.startswith(EXPERTS.format(1)) for name in kept)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_named_though_it_is_in_no_file(tmp_path, tied):
    shapes = Q | {"model.embed_tokens.weight": (512, 128)}
    _, said = quantized(tmp_path, shapes, {"tie_word_embeddings": tied})
    assert ("lm_head" in said["modules_to_not_convert"]) == tied


def test_saved_trees_name_the_same_modules(tmp_path):
    shapes = Q | {f"{EXPERTS.format(0)}.0.up_proj.weight": (192, 256)}
    shapes["model.embed_tokens.weight"] = (512, 128)
    config = {"tie_word_embeddings": True}
    _, said = quantized(tmp_path, shapes, config)
    params = checkpoint.load(tmp_path / "in")
    checkpoint.save(tmp_path / "b", checkpoint.quantize_params(params), config=config)
    table = json.loads((tmp_path / "b" / "config.json").read_text())
    assert table["quantization_config"] == said


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
