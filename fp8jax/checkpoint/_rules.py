"""Which weights of a model become FP8 offline."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.checkpoint._config import ScaleFormat
from fp8jax.checkpoint._families import EMBEDDING, HEAD, RAGGED
from fp8jax.quant import QTensor, QuantSpec, contraction_minor, quantize

TILE = (128, 128)

# Kept in DeepSeek-V3 too (report, section 3.3): what is small, or decides much.
_KEPT = (
    ("embedding", EMBEDDING),
    ("norm", re.compile(r"norm", re.IGNORECASE)),
    ("router", re.compile(r"router|(^|\.)(shared_expert_)?gate(\.|$)")),
    ("head", HEAD),
)
_LEAVES = ("weight", "kernel")
_DTYPES = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))


@dataclasses.dataclass(frozen=True)
class WeightRules:
    """Chooses weights by name, shape and dtype, and says how they are quantized.

    Matrices called `weight` or `kernel`, and stacks of matrices of `experts`, are
    quantized in 128x128 blocks; embeddings, norms, routers and heads are not (by name,
    and offline by the vocabulary's size in `config.json`), nor are weights with a side
    that is no multiple of 128: others misread such blocks, but for MLA's
    `kv_a_proj_with_mqa`, which is so in DeepSeek-V3's own files.

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
            for kind, pattern in _KEPT:
                if pattern.search(name):
                    return kind
            experts = len(shape) == 3 and "experts" in name
            matrix = len(shape) == 2 and name.rpartition(".")[2] in _LEAVES
            if not (matrix or experts):
                return "no linear layer's"
        ragged = self.ragged or RAGGED.search(name)
        if not ragged and (shape[-2] % TILE[0] or shape[-1] % TILE[1]):
            return "no multiple of 128"
        return None


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
