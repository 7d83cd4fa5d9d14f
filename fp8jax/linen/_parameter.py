"""Parameters under the names that Flax's own layers give them."""

import flax.linen as nn
import jax

from fp8jax.quant import QTensor


class Parameter(nn.Module):
    """One parameter of a submodule, as a layer of Flax's would have it, or a QTensor.

    Attributes:
        param_name: of the parameter: "kernel" of a Dense, "scale" of an RMSNorm.
        shape: of the parameter.
        param_dtype: likewise.
        initializer: of the parameter. Not `init`, which is a method of every module.
    """

    param_name: str
    shape: tuple[int, ...]
    param_dtype: jax.typing.DTypeLike
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> jax.Array | QTensor:
        stored = self.get_variable("params", self.param_name)
        if isinstance(stored, QTensor):
            if stored.shape != self.shape:
                raise ValueError(
                    f"fp8jax.linen takes {self.name}/{self.param_name} of shape "
                    f"{self.shape}, got a QTensor of {stored.shape}."
                )
            return stored
        return self.param(
            self.param_name, self.initializer, self.shape, self.param_dtype
        )
