"""Checkpoints: saving, restoring, digests, versions."""
