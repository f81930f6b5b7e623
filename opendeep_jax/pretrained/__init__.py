"""Open any model from anywhere, on any mesh."""
