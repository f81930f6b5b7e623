"""A run's ancestry in words, from its origin.json; without JAX, for those who only look."""

from typing import Any


def lineage(origin: dict[str, Any]) -> str:
    """Return a clause such as `branch of runs/trunk at step 500`; empty where a run began from its own seed."""
    kind, step = origin.get("kind"), origin.get("step")
    if kind == "branch":
        return f"branch of {origin.get('parent', 'another run')} at step {step}"
    return "imported weights" if kind == "import" else ""
