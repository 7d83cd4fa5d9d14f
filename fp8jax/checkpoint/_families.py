"""How models and their readers name what stays: embeddings, heads, fused layers.

| kept            | called                          | by                               |
| --------------- | ------------------------------- | -------------------------------- |
| embedding       | `embed_tokens`, `tok_embeddings`| Llama, Qwen, Gemma, DeepSeek     |
|                 | `wte`, `wpe`                    | GPT-2, Falcon                    |
|                 | `shared`                        | T5, BART                         |
|                 | `relative_attention_bias`       | T5                               |
|                 | `emb`                           | RWKV                             |
| head            | `lm_head`, `head`               | most, DeepSeek's own format      |
|                 | `output`                        | Llama's own format, InternLM2    |
|                 | `output_layer`                  | ChatGLM                          |
| MLA's pair      | `q_a_proj`, `kv_a_proj_with_mqa`| DeepSeek-V2, V3, Kimi, GLM       |
| next token      | `eh_proj`                       | DeepSeek-V3's last layer: vLLM's |
|                 |                                 | is a plain linear layer          |
| Conv1D          | every matrix, `[in, out]`       | GPT-2 and what is made of it     |
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fp8jax.checkpoint._layout import EMBEDDING
from fp8jax.checkpoint._tables import tables

# Kept in DeepSeek-V3 too (report, section 3.3): what is small, or decides much.
KEPT = (
    ("embedding", EMBEDDING),
    ("norm", re.compile(r"norm", re.IGNORECASE)),
    ("router", re.compile(r"router|(^|\.)(shared_expert_)?gate(\.|$)")),
    (
        "head",
        re.compile(
            r"(^|\.)(lm_head|head|classifier|cls|score|pooler|output_layer)(\.|$)"
            # A layer's own `output`, as BERT's, has a layer before it or behind it.
            r"|^(model\.|transformer\.|language_model\.)*output(\.(weight|kernel))?$"
        ),
    ),
    ("next token", re.compile(r"(^|\.)eh_proj(\.|$)")),
)

# kv_a_proj_with_mqa has 576 rows in every model published: with ragged ones alone do
# both become FP8.
MLA_PAIR = re.compile(r"(^|\.)(q_a_proj|kv_a_proj_with_mqa)(\.|$)")

# transformers' modules of these are Conv1D, which no FP8 layer takes the place of.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")

# vLLM makes one layer of each of these, in FP8 or not.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_GROUP = {name: group for group in _FUSED for name in group}
_LAYER_NUMBER = re.compile(r"(^|\.)\d+\.")
_EXPERTS = re.compile(r"(?P<module>(^|.*\.)experts)\.")
# What a file calls a module, and what transformers' model does.
_RENAMED = (("block_sparse_moe", "mlp"),)


def is_conv1d(config: Mapping[str, Any], name: str) -> bool:
    """Whether transformers' model multiplies by this weight as it is: `[in, out]`."""
    return config.get("model_type") in _CONV1D and bool(_CONV1D_NAMES.search(name))


def is_of_vocabulary(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> bool:
    """Whether a matrix outside the layers has a row for each entry of a vocabulary."""
    rows = {table.get("vocab_size") for table in tables(config)} - {None}
    is_outside = not _LAYER_NUMBER.search(name)
    return is_outside and len(shape) == 2 and shape[0] in rows


def is_matrix(name: str, ndim: int) -> bool:
    """Whether a reader has a layer for this tensor, or one for all experts'."""
    stacked = ndim == 3 and _EXPERTS.match(name) is not None
    return ndim >= 2 and (name.endswith(".weight") or stacked)


def fused_layer(name: str) -> str | None:
    """The layer that vLLM makes of this weight and others; None if of it alone."""
    if experts := _EXPERTS.match(name):
        return experts["module"]
    *parent, module, leaf = ["", *name.split(".")]
    group = _GROUP.get(module)
    return ".".join((*parent, "+".join(group), leaf)) if group else None


def modules_kept(
    kept: Iterable[str], names: Iterable[str], config: Mapping[str, Any]
) -> list[str]:
    """What `config.json` lists as not FP8, as each reader looks for it.

    Args:
        kept: names of the matrices that stay.
        names: of all tensors.
        config: the model's.
    """
    modules = set()
    for name in kept:
        modules.add(name.removesuffix(".weight"))
        # transformers makes one module of all experts, which has this name.
        if experts := _EXPERTS.match(name):
            modules.add(experts["module"])
    if _has_tied_head(names, config):
        modules.add("lm_head")
    for file, model in _RENAMED:
        modules |= {name.replace(file, model) for name in modules}
    return sorted(modules)


def _has_tied_head(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether the model has an `lm_head` which is no tensor of its own."""
    names = tuple(names)
    if any(re.search(r"(^|\.)lm_head\.", name) for name in names):
        return False
    key = "tie_word_embeddings"
    told = [table[key] for table in tables(config) if key in table]
    if told:
        return any(told)
    # transformers writes what is not its default, and most models tie by default.
    head = dict(KEPT)["head"]
    return "model_type" in config and not any(map(head.search, names))
