"""Training attention of DeepSeek's multi-head latent attention."""

from kernels_pallas.flash_mla.api import flash_mla as flash_mla
