"""Kernels: each a function with a plain reference and one file per backend. Imports jax alone."""
