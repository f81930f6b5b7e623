"""DeepSeek-V3's fine-grained FP8 matrix products, dense and grouped."""

from kernels_pallas.fp8_matmul.api import fp8_grouped_matmul as fp8_grouped_matmul
from kernels_pallas.fp8_matmul.api import fp8_matmul as fp8_matmul
