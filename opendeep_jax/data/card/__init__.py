"""The data card: what a run is trained on, where it came from, what was left out of it and why."""

from opendeep_jax.data.card.build import build_card
from opendeep_jax.data.card.write import write_card

__all__ = ["build_card", "write_card"]
