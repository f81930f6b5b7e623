"""Sweeps of runs."""
