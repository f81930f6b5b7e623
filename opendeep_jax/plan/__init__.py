"""What a run would take on chips that are not here: memory, time and cost, from the compiled training step."""
