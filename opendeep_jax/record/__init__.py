"""The files of a run directory: metrics, events, goodput, trackers, reports. No JAX."""
