"""What readers of FP8 checkpoints make of a model's names: tables, by family.

Readers make one layer of several, tie heads to embeddings, and look for experts under
a name of their own. The families beside an entry have such names in their files.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# What is looked up and not multiplied by: its rows are entries of a vocabulary.
EMBEDDING = re.compile(
    r"embed"  # embed_tokens, tok_embeddings, word_embeddings, embedding
    r"|(^|\.)w[tp]e(\.|$)"  # GPT-2
    r"|(^|\.)(shared|emb)\.weight$"  # T5, BART; RWKV
)
HEAD = re.compile(
    r"(^|\.)(lm_head|head|classifier|cls|score|pooler)(\.|$)"
    r"|^(\w+\.)?(output|output_layer)\.weight$"  # Llama's own, InternLM2; ChatGLM
)

# Layers that a reader makes one of: all of a module's are FP8, or none is.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, GLM-4
    ("gate_proj", "up_proj"),  # the same
    ("w1", "w3"),  # Mixtral, Llama's own
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek-V2 and V3, Kimi, GLM with MLA
    ("query", "key", "value"),  # BERT
)
# Quantized though its 576 rows end within a tile, as in DeepSeek-V3's own files.
RAGGED = re.compile(r"(^|\.)kv_a_proj_with_mqa(\.weight)?$")

_EXPERTS = re.compile(r"^(.*\.experts)\.")
_LAYER_NUMBER = re.compile(r"(^|\.)\d+\.")


def vocabulary_rows(config: Mapping[str, Any]) -> int | None:
    """How many rows an embedding or a head has, where `config.json` says so."""
    for table in (config, config.get("text_config")):
        rows = table.get("vocab_size") if isinstance(table, Mapping) else None
        if type(rows) is int:
            return rows
    return None


def is_of_vocabulary(name: str, shape: tuple[int, ...], rows: int | None) -> bool:
    """Whether a matrix outside the layers has a row for each entry of a vocabulary."""
    is_outside = not _LAYER_NUMBER.search(name)
    return is_outside and len(shape) == 2 and rows is not None and shape[0] == rows


def left_by_their_own(
    kept: Collection[str], converted: Collection[str]
) -> dict[str, str]:
    """Weights that stay because one that is fused with them does, and that one."""
    where = {name: _fused(name) for name in (*kept, *converted)}
    stays = {place: name for name in kept if (place := where[name]) is not None}
    return {
        name: stays[place]
        for name in converted
        if (place := where[name]) is not None and place in stays
    }


def _fused(name: str) -> tuple[str, int] | None:
    """The module and the group of a weight that readers fuse with others."""
    module, _, layer = name.removesuffix(".weight").rpartition(".")
    for i, group in enumerate(FUSED):
        if layer in group:
            return module, i
    return None


def is_layer(name: str, rank: int) -> bool:
    """Whether a tensor is a layer's matrix, or a stack of experts', for readers."""
    return rank >= 2 and (
        name.endswith(".weight") or (rank == 3 and _EXPERTS.match(name) is not None)
    )


def modules_kept(
    kept: Iterable[str], converted: Iterable[str], config: Mapping[str, Any]
) -> list[str]:
    """Modules that readers must not make FP8 layers of, as they look for them.

    Args:
        kept: names of matrices, and of stacks of experts', that stay as they are.
        converted: names of those that are FP8.
        config: of the model.

    Returns:
        The modules of `kept`; a module of experts where none of its is FP8; and
        `lm_head` where it is the embedding, and in no file.
    """
    kept = list(kept)
    modules = {name.removesuffix(".weight") for name in kept}
    fp8 = {found[1] for name in converted if (found := _EXPERTS.match(name))}
    mine = {found[1] for name in kept if (found := _EXPERTS.match(name))}
    modules |= mine - fp8
    if _is_tied(config) and not any(map(HEAD.search, kept)):
        modules.add("lm_head")
    return sorted(modules)


def _is_tied(config: Mapping[str, Any]) -> bool:
    tables = [config, config.get("text_config")]
    return any(
        isinstance(table, Mapping) and table.get("tie_word_embeddings") is True
        for table in tables
    )
