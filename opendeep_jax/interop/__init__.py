"""Other people's model files, read and written without torch: Hugging Face directories and GGUF files."""

from opendeep_jax.interop.gguf import load_gguf, save_gguf
from opendeep_jax.interop.hf import config_from_hf, config_to_hf, load_hf, save_hf

__all__ = ["config_from_hf", "config_to_hf", "load_gguf", "load_hf", "save_gguf", "save_hf"]
