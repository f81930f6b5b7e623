"""The decoder: one network whose configuration makes it DeepSeek-V3, V2, a GQA or a dense model."""
