"""Cross-entropy through the output head."""

from kernels_pallas.cross_entropy.api import fused_cross_entropy as fused_cross_entropy
