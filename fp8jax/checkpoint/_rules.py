"""Which weights of a model become FP8 offline."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.checkpoint._config import ScaleFormat
from fp8jax.checkpoint._families import (
    KEPT,
    MLA_PAIR,
    fused_layer,
    is_conv1d,
    is_of_vocabulary,
)
from fp8jax.quant import QTensor, QuantSpec, contraction_minor, quantize

TILE = (128, 128)

_LEAVES = ("weight", "kernel")
_DTYPES = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))


@dataclasses.dataclass(frozen=True)
class WeightRules:
    """Chooses weights by name, shape and dtype, and says how they are quantized.

    Matrices called `weight` or `kernel`, and stacks of matrices of `experts`, are
    quantized in 128x128 blocks; embeddings, norms, routers and heads are not,
    nor are weights with a side that is no multiple of 128: others misread such blocks.

    Attributes:
        include: regular expressions; if any, only names in which one is found are
            quantized, whatever they are called.
        exclude: of names that are kept, included or not.
        ragged: quantize weights whose sides are no multiples of 128 too.
        scale: `"fp32"`, or `"ue8m0"` for powers of two.

    Raises:
        ValueError: If an expression is none, or `scale` is unknown.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    ragged: bool = False
    scale: ScaleFormat = "fp32"

    def __post_init__(self) -> None:
        if self.scale not in ("fp32", "ue8m0"):
            raise ValueError(
                f"WeightRules takes scale 'fp32' or 'ue8m0', got {self.scale!r}."
            )
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"WeightRules takes regular expressions, got {pattern!r}: {error}."
                ) from None

    @property
    def spec(self) -> QuantSpec:
        kind = "pow2" if self.scale == "ue8m0" else "fp32"
        return QuantSpec(tile=TILE, scale=kind)

    def reason_kept(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype
    ) -> str | None:
        """Why a tensor is not quantized; None if it is.

        Args:
            name: with dots between its parts.
            shape: of the tensor, in either orientation.
            dtype: of the tensor.
        """
        if np.dtype(dtype) not in _DTYPES:
            return str(np.dtype(dtype))
        if len(shape) < 2 or not all(shape):
            return "no matrix"
        if any(re.search(pattern, name) for pattern in self.exclude):
            return "excluded"
        if self.include:
            if not any(re.search(pattern, name) for pattern in self.include):
                return "not included"
        else:
            for kind, pattern in KEPT:
                if pattern.search(name):
                    return kind
            if not self.ragged and MLA_PAIR.search(name):
                return "fused with a ragged one"
            experts = len(shape) == 3 and "experts" in name
            matrix = len(shape) == 2 and name.rpartition(".")[2] in _LEAVES
            if not (matrix or experts):
                return "no linear layer's"
        if not self.ragged and (shape[-2] % TILE[0] or shape[-1] % TILE[1]):
            return "no multiple of 128"
        return None


def reasons_kept(
    rules: WeightRules,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    config: Mapping[str, Any],
) -> dict[str, str | None]:
    """`reason_kept` of each tensor of a model, by what its readers make of it, too.

    What vLLM makes one layer of is FP8 as a whole or stays, unless `rules.include`
    asks for parts of it.

    Args:
        rules: of single tensors.
        tensors: shapes and dtypes by name.
        config: the model's `config.json`.
    """
    reasons = {name: rules.reason_kept(name, *of) for name, of in tensors.items()}
    if rules.include:
        return reasons
    for name, reason in reasons.items():
        if reason is None and is_conv1d(config, name):
            reasons[name] = "Conv1D"
        elif reason is None and is_of_vocabulary(name, tensors[name][0], config):
            reasons[name] = "vocabulary"
    matrices = [name for name, (shape, _) in tensors.items() if len(shape) > 1]
    layers = {name: layer for name in matrices if (layer := fused_layer(name))}
    split: dict[str, str] = {}
    for name, layer in layers.items():
        if reasons[name] is not None:
            split.setdefault(layer, name)
    for name, layer in layers.items():
        if reasons[name] is None and layer in split:
            reasons[name] = f"fused with {split[layer]}"
    return reasons


def quantize_params(params: Any, rules: WeightRules | None = None) -> Any:
    """A tree of weights with those that `rules` choose as QTensors in 128x128 blocks.

    Args:
        params: a pytree, in Hugging Face's or Flax's orientation: a block's codes are
            those of its transpose. QTensors in it stay. What is called `kernel` is laid
            out by `quant.contraction_minor`.
        rules: `WeightRules()` by default, with float32 scales.

    Returns:
        The same tree with QTensors in it, for `save` or `fp8jax.nnx.Linear`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    rules = WeightRules() if rules is None else rules

    def each(path: Any, x: Any) -> Any:
        if isinstance(x, QTensor):
            return x
        name = ".".join(jax.tree_util.keystr((k,), simple=True) for k in path)
        kept = rules.reason_kept(name, x.shape, x.dtype)
        if kept:
            return x
        q = quantize(x, rules.spec)
        # Flax's are [in, out]: kernels read the contraction last.
        return contraction_minor(q) if name.endswith("kernel") else q

    return jax.tree.map_with_path(
        each, params, is_leaf=lambda x: isinstance(x, QTensor)
    )
