"""Cross-entropy and log-probabilities of tokens, through the output head."""

from kernels_pallas.cross_entropy.api import fused_cross_entropy as fused_cross_entropy
from kernels_pallas.cross_entropy.api import token_logprobs as token_logprobs
