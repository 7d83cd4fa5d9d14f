"""Parameters under the names that Flax's own layers give them."""

import flax.linen as nn
import jax


class Parameter(nn.Module):
    """One parameter of a submodule, as a layer of Flax's would have it.

    Attributes:
        param_name: of the parameter: "kernel" of a Dense, "scale" of an RMSNorm.
        shape: of the parameter.
        param_dtype: likewise.
        init: its initializer.
    """

    param_name: str
    shape: tuple[int, ...]
    param_dtype: jax.typing.DTypeLike
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(self.param_name, self.init, self.shape, self.param_dtype)
