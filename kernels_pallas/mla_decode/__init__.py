"""Decoding with multi-head latent attention: one token of each row against its cache of latents."""

from kernels_pallas.mla_decode.api import mla_decode as mla_decode
