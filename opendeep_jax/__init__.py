"""OpenDeep: train, post-train, trace and release fully open models of DeepSeek-V3 class."""

__version__ = "0.1.0"
