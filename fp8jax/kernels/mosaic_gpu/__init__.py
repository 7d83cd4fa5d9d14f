"""The kernels in Pallas Mosaic GPU, for Hopper (compute capability 9.0)."""

from fp8jax.kernels.mosaic_gpu._candidates import gemm_candidates
from fp8jax.kernels.mosaic_gpu._choose import (
    choose_config,
    computed_config,
    load_tuning,
    measured_entry,
    present_device_kind,
)
from fp8jax.kernels.mosaic_gpu._common import num_sms
from fp8jax.kernels.mosaic_gpu._config import CHUNK, SMEM_BYTES, GemmConfig
from fp8jax.kernels.mosaic_gpu._gemm import gemm, multiply
from fp8jax.kernels.mosaic_gpu._gemm_swiglu import gemm_swiglu
from fp8jax.kernels.mosaic_gpu._grouped import (
    grouped_gemm,
    grouped_gemm_k,
    multiply_columns,
    multiply_rows,
)
from fp8jax.kernels.mosaic_gpu._limits import refusal, smem_bytes
from fp8jax.kernels.mosaic_gpu._map import quantize_map
from fp8jax.kernels.mosaic_gpu._problem import GEMM_KINDS, GemmKind, GemmProblem
from fp8jax.kernels.mosaic_gpu._quantize import (
    quantize,
    quantize_both,
    quantize_grouped,
)
from fp8jax.kernels.mosaic_gpu._rms_norm import quantize_add_rms_norm, quantize_rms_norm
from fp8jax.kernels.mosaic_gpu._swiglu import quantize_swiglu, quantize_swiglu_gradient
from fp8jax.kernels.mosaic_gpu._table import Entry, Table, read_table, write_table

__all__ = [
    "CHUNK",
    "GEMM_KINDS",
    "SMEM_BYTES",
    "Entry",
    "GemmConfig",
    "GemmKind",
    "GemmProblem",
    "Table",
    "choose_config",
    "computed_config",
    "gemm",
    "gemm_candidates",
    "gemm_swiglu",
    "grouped_gemm",
    "grouped_gemm_k",
    "load_tuning",
    "measured_entry",
    "multiply",
    "multiply_columns",
    "multiply_rows",
    "num_sms",
    "present_device_kind",
    "quantize",
    "quantize_add_rms_norm",
    "quantize_both",
    "quantize_grouped",
    "quantize_map",
    "quantize_rms_norm",
    "quantize_swiglu",
    "quantize_swiglu_gradient",
    "read_table",
    "refusal",
    "smem_bytes",
    "write_table",
]
