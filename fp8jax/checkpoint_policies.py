"""Policies for `jax.checkpoint`: what a recomputed block keeps of its FP8 products.

`jax.checkpoint_policies.dots_saveable` and its like know `lax.dot_general` alone, which
an FP8 product is not. Each `fp8jax.dot_general`, and so each layer, names what it makes
(`ops.PRODUCT`, `ops.INPUT_CODES`, `ops.WEIGHT_CODES`), and these policies save by name.
`jax.checkpoint_policies.save_from_both_policies` joins two. To keep nothing, leave
`policy` out: then all is recomputed and quantized again.
"""

import jax

from fp8jax import ops

_save = jax.checkpoint_policies.save_only_these_names

# No GEMM of the forward pass runs again; their inputs are quantized again.
products_saveable = _save(ops.PRODUCT)

# Each weight is quantized in the forward pass alone: a byte a parameter, or two with
# residual="fp8". GEMMs run again.
weight_codes_saveable = _save(ops.WEIGHT_CODES)

# Neither inputs nor weights are quantized again. GEMMs run again, if asked for.
codes_saveable = _save(ops.INPUT_CODES, ops.WEIGHT_CODES)

# No GEMM runs again and nothing is quantized again; what is cheap is recomputed.
products_and_codes_saveable = _save(ops.PRODUCT, ops.INPUT_CODES, ops.WEIGHT_CODES)
