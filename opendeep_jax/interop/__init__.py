"""Other people's model files: Hugging Face directories, read and written without torch."""

from opendeep_jax.interop.hf import config_from_hf, config_to_hf, load_hf, save_hf

__all__ = ["config_from_hf", "config_to_hf", "load_hf", "save_hf"]
