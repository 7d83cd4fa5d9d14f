"""Every config that the GEMM kernels run with, to lower or to run each of them."""

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8jax.kernels.mosaic_gpu import GemmConfig, GemmKind

# At and beside every size at which a config may change; with and without a full GPU.
_M = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128, 129, 192, 256, 257, 384, 512)
_M += (1024, 2048, 4096, 8192, 16384, 65536)
_N = (1, 64, 576, 1536, 2048, 2112, 4096, 7168, 8448, 16384, 24576, 32768, 65536)
_K = (1, 128, 256, 512, 1536, 2048, 3884, 7168, 16384, 32768)
_SMS = (132, 114, 78)  # H100 SXM and H200, H100 PCIe, H20.


def every_gemm_config(kind: "GemmKind", out_dtype: str) -> "list[GemmConfig]":
    """What `computed_config` returns over a dense grid of shapes, each once.

    Args:
        kind: "1d2d" or "1d1d".
        out_dtype: "bfloat16" or "float32".
    """
    # Not above: Pallas takes long to import.
    from fp8jax.kernels.mosaic_gpu import computed_config

    return list(
        dict.fromkeys(
            computed_config(kind, m, n, k, out_dtype, num_sms)
            for m, n, k, num_sms in itertools.product(_M, _N, _K, _SMS)
        )
    )
