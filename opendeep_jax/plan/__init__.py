"""Prediction of a run's memory, time and cost on any chips, from the compiled training step."""
