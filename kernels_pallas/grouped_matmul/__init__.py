"""Matrix multiplication of row groups, each with its own weights."""

from kernels_pallas.grouped_matmul.api import grouped_matmul as grouped_matmul
from kernels_pallas.grouped_matmul.api import grouped_swiglu as grouped_swiglu
